"""Processes of tests, forked from a server that has imported torch and fastbyol: each saves 2 s of CPU time."""

from __future__ import annotations

import multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fastbyol.cli.train", "tests.conftest"])
