"""Optimisers that also move the target network: LARS and parameter groups here; others in modules of their own."""

from fastbyol.optim.groups import MissingGradient, configured_groups, gradient_of, is_excluded, parameter_groups, set_lr
from fastbyol.optim.lars import LARS, build, build_sgd

__all__ = [
    "LARS",
    "MissingGradient",
    "build",
    "build_sgd",
    "configured_groups",
    "gradient_of",
    "is_excluded",
    "parameter_groups",
    "set_lr",
]
