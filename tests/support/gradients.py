"""Gradients for tests of optimisers: random ones, and those of a twin."""

from __future__ import annotations

import torch
from torch import nn


def set_gradients(module: nn.Module, *, scale: float = 1.0) -> None:
    """Give each parameter a normal random gradient of this standard deviation."""
    for parameter in module.parameters():
        parameter.grad = scale * torch.randn_like(parameter)


def copy_gradients(module: nn.Module, twin: nn.Module) -> None:
    """Give a network of the same parameters the gradients of another, in its own memory order."""
    for parameter, other in zip(module.parameters(), twin.parameters(), strict=True):
        assert parameter.grad is not None
        other.grad = torch.empty_like(other).copy_(parameter.grad)
