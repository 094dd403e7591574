"""Know every specialisation of a kernel that training launches, and the limits its machine code must keep."""

from __future__ import annotations

from benchmarks.aot import Build

BUILDS: tuple[Build, ...] = ()
