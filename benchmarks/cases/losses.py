"""The timed losses: BYOL's with its gradient, alone and with the EMA of all targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import plain
from benchmarks.cases.compare import FLOAT32, HALF, agree
from benchmarks.harness import Case, Ready
from fastbyol.kernels import reference
from fastbyol.kernels.byol_loss import byol_loss
from fastbyol.kernels.ema_loss import Workspace, ema_loss

PROJECTION = 256  # the paper's
ROWS = {"cuda": (1024, 8192), "cpu": (64,)}  # 2B: 512 images a GPU, and the paper's 4096
TAU = 0.99
RESNET50_BRANCH = (
    *(2048 * 512,) * 23,
    *(4096 * 2048, 256 * 4096),
    *(512,) * 140,
)  # 33.6 M in 165 tensors, about the sizes
SMALL_BRANCH = (3**3 * 64, 5, 1000)


class Tensors(NamedTuple):
    """Predictions and projections [2B, D], the tensors of an EMA, and what our launches keep on the device."""

    q: Tensor
    z: Tensor
    targets: list[Tensor]
    params: list[Tensor]
    tau: Tensor
    ticket: Tensor
    workspace: Workspace


Loss = Callable[[Tensors], Tensor]


def _tensors(rows: int, sizes: Sequence[int], device: str) -> Tensors:
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    q, z = (drawn(rows, PROJECTION).to(dtype) for _ in range(2))
    targets, params = ([drawn(size) for size in sizes] for _ in range(2))
    tau = torch.tensor(TAU, dtype=torch.float64, device=device)
    ticket = torch.zeros(1, dtype=torch.int32, device=device)
    return Tensors(q.requires_grad_(), z, targets, params, tau, ticket, Workspace())


def plain_ema_loss(q: Tensor, z: Tensor, targets: Sequence[Tensor], params: Sequence[Tensor], *, tau: float) -> Tensor:
    """Move the targets in a loop over tensors, then compute the loss."""
    for target, param in zip(targets, params, strict=True):
        target.mul_(tau).add_(param, alpha=1 - tau)
    return plain.loss(q, z)


def _loss_and_gradient(loss: Loss, given: Tensors) -> Ready:
    def run() -> tuple[Tensor, Tensor]:
        value = loss(given)
        return value, *torch.autograd.grad(value, given.q)

    def check() -> None:
        wide = given.q.detach().double().requires_grad_()
        expected = reference.byol_loss(wide, given.z.double())
        tolerance = HALF if given.q.dtype == torch.bfloat16 else FLOAT32
        agree(run(), (expected, *torch.autograd.grad(expected, wide)), tolerance=tolerance)

    return Ready(run, check)


def _with_ema(loss: Loss, given: Tensors) -> Ready:
    ready = _loss_and_gradient(loss, given)

    def check() -> None:
        expected = [TAU * t.double() + (1 - TAU) * p.double() for t, p in zip(given.targets, given.params, strict=True)]
        assert ready.check is not None
        ready.check()
        agree(given.targets, expected, tolerance=FLOAT32)

    return Ready(ready.run, check)


def cases(device: str) -> Iterator[Case]:
    """Compare the loss with its gradient, then the same with the EMA of a ResNet-50's online branch."""
    sizes = RESNET50_BRANCH if device == "cuda" else SMALL_BRANCH
    rivals: dict[str, Loss] = {
        "fastbyol": lambda t: byol_loss(t.q, t.z, ticket=t.ticket),
        "eager": lambda t: plain.loss(t.q, t.z),
    }
    with_ema: dict[str, Loss] = {
        "fastbyol": lambda t: ema_loss(t.q, t.z, t.targets, t.params, tau=t.tau, workspace=t.workspace),
        "foreach": lambda t: reference.ema_loss(t.q, t.z, t.targets, t.params, tau=TAU),
        "eager": lambda t: plain_ema_loss(t.q, t.z, t.targets, t.params, tau=TAU),
    }
    for rows in ROWS[device]:
        yield from _comparison("byol_loss and gradient", rows, (), rivals, _loss_and_gradient, device)
    yield from _comparison("ema_loss and gradient", ROWS[device][0], sizes, with_ema, _with_ema, device)


def _comparison(
    name: str,
    rows: int,
    sizes: Sequence[int],
    rivals: dict[str, Loss],
    ready: Callable[[Loss, Tensors], Ready],
    device: str,
) -> Iterator[Case]:
    tensors = cache(lambda: _tensors(rows, sizes, device))
    if device == "cuda":
        rivals = rivals | {"compile": torch.compile(rivals["eager"], dynamic=False)}
    for implementation, loss in rivals.items():
        yield Case(
            name,
            f"{rows}x{PROJECTION}" + (f", {sum(sizes) / 1e6:.1f} M parameters in {len(sizes)}" if sizes else ""),
            implementation,
            lambda loss=loss: ready(loss, tensors()),  # type: ignore[misc]
            dtype="bfloat16" if device == "cuda" else "float32",
            is_alone=implementation == "compile",
            bytes_moved=rows * PROJECTION * 3 * (2 if device == "cuda" else 4) + 12 * sum(sizes),
        )
