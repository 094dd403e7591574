"""Know where a process of ours computes."""

from __future__ import annotations

import torch

from fastbyol.config import ConfigError


def choose(asked: str | None) -> str:
    """Return "cuda" or "cpu": what was asked for, else the GPU if there is one; raise ConfigError if it is missing."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda, but torch finds no GPU; give --device cpu, or install a CUDA build of torch")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")
