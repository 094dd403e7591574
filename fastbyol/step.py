"""Know one training step: forward, backward, LARS and EMA."""

from __future__ import annotations

from torch import Tensor

from fastbyol.byol import BYOL, Output
from fastbyol.optim import LARS


def train_step(model: BYOL, optimizer: LARS, views: Tensor, *, lr: float, tau: float) -> Output:
    """Take one step on views [2B, 3, H, W], view-major; move online, momenta, running statistics and target in place.

    No host sync. The loss returned is that before the step, detached.
    """
    optimizer.zero_grad(set_to_none=True)
    output: Output = model(views)
    output.loss.backward()  # type: ignore[no-untyped-call]
    optimizer.set_rates(lr=lr, tau=tau)
    optimizer.step()
    return Output(output.loss.detach(), output.target_projections)
