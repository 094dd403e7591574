"""Know where a process of ours computes: the device, and the threads of its CPU kernels."""

from __future__ import annotations

import os

import torch

from fastbyol.config import ConfigError


def choose(asked: str | None) -> str:
    """Return "cuda" or "cpu": what was asked for, else the GPU if there is one; raise ConfigError if it is missing."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda, but torch finds no GPU; give --device cpu, or install a CUDA build of torch")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def use_all_cores() -> None:
    """Give torch every logical core this process may use, unless OMP_NUM_THREADS says otherwise.

    Torch's default is one thread a physical core; with both hyperthreads of a core a step is 1.9 times faster
    (docs/log.md).
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
