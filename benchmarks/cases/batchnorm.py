"""The timed batch norms: those of a ResNet-50, with their ReLU, with and without a residual sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules._functions import SyncBatchNorm as TorchSyncBatchNorm

from benchmarks.cases import plain
from benchmarks.cases.compare import FLOAT32, HALF, HALF_MASKS, agree
from benchmarks.harness import Absent, Case, Ready
from fastbyol.errors import ConfigError
from fastbyol.kernels.batchnorm import batch_norm_act, batch_norm_add_relu
from fastbyol.kernels.reference import NormParams
from fastbyol.model.batchnorm import EPS, MOMENTUM
from fastbyol.optim import larc

SHAPES = (  # channels, side, residual: the widest batch norms of each stage of a ResNet-50 at 224 px
    (64, 56, False),
    (256, 56, True),
    (128, 28, False),
    (512, 28, True),
    (256, 14, False),
    (1024, 14, True),
    (512, 7, False),
    (2048, 7, True),
)
IMAGES = {"cuda": 256, "cpu": 4}
MASK_BYTES = 1 / 8


@dataclass(frozen=True)
class Problem:
    """A batch norm of x [views * images, channels, side, side] in channels-last memory."""

    channels: int
    side: int
    has_residual: bool
    views: int
    device: str

    @property
    def dtype(self) -> torch.dtype:
        """What autocast leaves convolutions in, and for one population what apex's groupbn is limited to."""
        if self.device == "cpu":
            return torch.float32
        return torch.float16 if self.views == 1 else torch.bfloat16

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of x."""
        return self.views * IMAGES[self.device], self.channels, self.side, self.side

    def bytes_moved(self, *, backward: bool) -> int:
        """Count what statistics, then normalisation, must move, and the same backward (kernels/batchnorm.py)."""
        tensors = (4.0 if self.has_residual else 3.0) + backward * (7 if self.has_residual else 5)
        masks = 2 * MASK_BYTES if backward and self.has_residual else 0
        elements = torch.Size(self.shape).numel()
        return int(elements * (tensors * self.dtype.itemsize + masks))


class Tensors(NamedTuple):
    """The inputs that all rivals share, and the gradients of the output's one or two consumers."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor
    grads: tuple[Tensor, ...]


def _tensors(problem: Problem) -> Tensors:
    generator = torch.Generator(problem.device).manual_seed(0)

    def drawn(*, std: float = 1.0, mean: float = 0.0) -> Tensor:
        x = torch.randn(problem.shape, generator=generator, device=problem.device, dtype=problem.dtype)
        return x.mul_(std).add_(mean).contiguous(memory_format=torch.channels_last)

    weight = torch.rand(problem.channels, generator=generator, device=problem.device) + 0.5
    bias = torch.randn(problem.channels, generator=generator, device=problem.device)
    residual = drawn() if problem.has_residual else None
    return Tensors(
        drawn(std=1.5, mean=0.5), residual, weight, bias, tuple(drawn() for _ in range(1 + problem.has_residual))
    )


Forward = Callable[..., Sequence[Tensor]]  # x, residual, weight, bias, running_mean, running_var -> one or two results


def fused(x: Tensor, residual: Tensor | None, *moved: Tensor, views: int, group: Any = None) -> Sequence[Tensor]:
    """Call fastbyol's kernels: all views in one call."""
    norm = NormParams(*moved, None, views=views, momentum=MOMENTUM, eps=EPS, group=group)
    if residual is None:
        return (batch_norm_act(x, norm, relu=True),)
    return batch_norm_add_relu(x, residual, norm)


def in_torch(x: Tensor, residual: Tensor | None, *moved: Tensor) -> Sequence[Tensor]:
    """Call torch's operations, on one view."""
    z = plain.norm_relu(x, residual, *moved)
    return (z,) if residual is None else (z, z)


def synchronized(x: Tensor, residual: Tensor | None, *moved: Tensor) -> Sequence[Tensor]:
    """Call what torch.nn.SyncBatchNorm runs on several ranks; the module itself skips it on one."""
    weight, bias, mean, var = moved
    y = TorchSyncBatchNorm.apply(x, weight, bias, mean, var, EPS, MOMENTUM, _group(), 1)
    z = F.relu_(y if residual is None else y + residual)
    return (z,) if residual is None else (z, z)


@cache
def _group() -> dist.ProcessGroup:
    """Make a process group of one, without a network."""
    if not dist.is_initialized():
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _apex(name: str, problem: Problem) -> Forward:
    """Wrap a batch norm of apex, which fuses ReLU and residual and takes [N, H, W, C]."""
    try:
        module = larc.import_piece(name)
    except ConfigError as error:
        raise Absent(str(error)) from error
    synced = {"process_group": _group(), "channel_last": True} if name == "SyncBatchNorm" else {}
    norm = module(problem.channels, fuse_relu=True, **synced).to(problem.device)

    def forward(x: Tensor, residual: Tensor | None, *moved: Tensor) -> Sequence[Tensor]:
        named = dict(zip(("weight", "bias", "running_mean", "running_var"), moved, strict=True))
        images = tuple(t.permute(0, 2, 3, 1) for t in (x, residual) if t is not None)
        z = torch.func.functional_call(norm, named, images).permute(0, 3, 1, 2)
        return (z,) if residual is None else (z, z)

    return forward


def _run(forward: Forward, tensors: Tensors, *, parts: int, backward: bool) -> Callable[[], tuple[Tensor, ...]]:
    """Bind a forward to its inputs: all views in one call (parts 1) or one call a view, as others' code has it.

    It returns the results of every part, or with `backward` the gradients of every part's x and residual, then of
    weight and bias.
    """

    def split(tensor: Tensor) -> list[Tensor]:
        return [part.detach().requires_grad_(backward) for part in tensor.chunk(parts)]

    xs = split(tensors.x)
    residuals = [None] * parts if tensors.residual is None else split(tensors.residual)
    weight, bias = (p.detach().requires_grad_(backward) for p in (tensors.weight, tensors.bias))
    running = torch.zeros_like(weight, requires_grad=False), torch.ones_like(weight, requires_grad=False)
    grads = [grad for part in zip(*(g.chunk(parts) for g in tensors.grads), strict=True) for grad in part]
    leaves = [*xs, *(r for r in residuals if r is not None), weight, bias]

    def run() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(backward):
            results = [z for x, r in zip(xs, residuals, strict=True) for z in forward(x, r, weight, bias, *running)]
            return torch.autograd.grad(results, leaves, grads) if backward else tuple(results)

    return run


def _joined(parts: int, problem: Problem, results: Sequence[Tensor], *, backward: bool) -> list[Tensor]:
    """Concatenate the parts' results, so that runs with different numbers of parts can be compared."""
    if not backward:
        step = 1 + problem.has_residual
        return [torch.cat(tuple(results[::step]))]
    images, moved = results[:-2], results[-2:]
    return [*(torch.cat(tuple(images[i : i + parts])) for i in range(0, len(images), parts)), *moved]


def _prepare(
    make: Callable[[], Forward],
    problem: Problem,
    tensors: Callable[[], Tensors],
    *,
    parts: int,
    backward: bool,
    tolerance: float,
) -> Ready:
    forward, given = make(), tensors()
    run = _run(forward, given, parts=parts, backward=backward)

    def check() -> None:
        wide = Tensors(*(_wide(t) for t in given))  # the mathematics on the same numbers
        expected = _run(in_torch, wide, parts=problem.views, backward=backward)()
        agree(
            _joined(parts, problem, run(), backward=backward),
            _joined(problem.views, problem, expected, backward=backward),
            tolerance=tolerance,
        )

    return Ready(run, check)


def _wide(given: Any) -> Any:
    if isinstance(given, tuple):
        return tuple(_wide(t) for t in given)
    return given if given is None else given.float()


def cases(device: str) -> Iterator[Case]:
    """Compare forward alone (the target's) and forward with backward (the online network's), two views a batch.

    On a GPU also one population, where rivals with a process group, here of one, can join.
    """
    for channels, side, has_residual in SHAPES if device == "cuda" else SHAPES[-2:]:
        for backward in (False, True):
            yield from _comparison(Problem(channels, side, has_residual, 2, device), backward=backward)
    if device == "cuda":
        for channels, side, has_residual in SHAPES[:2]:
            yield from _comparison(Problem(channels, side, has_residual, 1, device), backward=True)


def _comparison(problem: Problem, *, backward: bool) -> Iterator[Case]:
    rivals: dict[str, tuple[Callable[[], Forward], int]] = {
        "fastbyol": (lambda: partial(fused, views=problem.views), 1),
        "eager": (lambda: in_torch, problem.views),
    }
    if problem.device == "cuda" and problem.side >= (28 if backward else 56):  # each takes seconds to compile
        rivals["compile"] = (lambda: torch.compile(in_torch, fullgraph=True, dynamic=False), problem.views)
    if problem.device == "cuda" and problem.views == 1:
        rivals["fastbyol, process group"] = (lambda: partial(fused, views=1, group=_group()), 1)
        rivals["torch SyncBatchNorm"] = (lambda: synchronized, 1)
        rivals["apex SyncBatchNorm"] = (lambda: _apex("SyncBatchNorm", problem), 1)
        rivals["apex groupbn"] = (lambda: _apex("BatchNorm2d_NHWC", problem), 1)
    tensors = cache(lambda: _tensors(problem))
    of = IMAGES[problem.device]
    for name, (make, parts) in rivals.items():
        is_ours = name.startswith("fastbyol")
        narrow = HALF if is_ours else HALF_MASKS
        yield Case(
            f"batch norm{' + residual' * problem.has_residual} + relu, forward{' and backward' * backward}",
            f"{problem.views}x{of}x{problem.channels}x{problem.side}x{problem.side}",
            name,
            partial(
                _prepare,
                make,
                problem,
                tensors,
                parts=parts,
                backward=backward,
                tolerance=FLOAT32 if problem.dtype == torch.float32 else narrow,
            ),
            dtype=str(problem.dtype).removeprefix("torch."),
            bytes_moved=problem.bytes_moved(backward=backward),
            is_alone=name == "compile",
        )
