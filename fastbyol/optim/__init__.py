"""Optimisers, each of which also moves the target network: LARS here; Muon and AdamW beside it."""

from fastbyol.optim.groups import MissingGradient, gradient_of, is_excluded, parameter_groups
from fastbyol.optim.lars import LARS, build, build_sgd

__all__ = ["LARS", "MissingGradient", "build", "build_sgd", "gradient_of", "is_excluded", "parameter_groups"]
