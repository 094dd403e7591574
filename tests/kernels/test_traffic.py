"""Law of the byte counts: an interpreted launch touches as many bytes as are counted for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton import knobs
from triton.runtime.interpreter import GridExecutor, interpreter_builder

from benchmarks.traffic import launched
from fastbyol.kernels.batchnorm import batch_norm_act, batch_norm_add_relu
from fastbyol.kernels.batchnorm_pool import batch_norm_relu_pool
from fastbyol.kernels.lars_ema import Workspace, lars_ema_
from fastbyol.kernels.max_pool import max_pool
from fastbyol.kernels.pointwise import pointwise_statistics
from fastbyol.kernels.reference import LarsGroup, LarsRates, NormParams
from fastbyol.kernels.segments import BLOCK
from fastbyol.kernels.stem import stem_convolution

pytestmark = [
    pytest.mark.usefixtures("short_splits"),
    pytest.mark.skipif(not knobs.runtime.interpret, reason="only an interpreter tells which bytes are touched"),
]
Touched = list[tuple[str, int, int]]  # kernel, bytes counted, bytes that were read or written


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> Touched:
    """Collect an entry for each launch that is interpreted from here on."""
    found: Touched = []
    bytes_: dict[str, set[int]] = {"read": set(), "written": set()}

    def note(kind: str, pointers: Any, mask: Any) -> None:
        width = pointers.get_element_ty().primitive_bitwidth // 8
        starts = np.unique(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]).astype(np.int64)
        bytes_[kind].update((starts[:, None] + np.arange(width)).ravel().tolist())

    load, store, run = (
        interpreter_builder.create_masked_load,
        interpreter_builder.create_masked_store,
        GridExecutor.__call__,
    )

    def noted_load(pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        note("read", pointers, mask)
        return load(pointers, mask, *rest, **named)

    def noted_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note("written", pointers, mask)
        return store(pointers, value, mask, *rest)

    def noted_run(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        for each in bytes_.values():
            each.clear()
        run(self, *args, **kwargs)
        moved = sum(map(len, bytes_.values()))
        found.append((self.fn.__name__, launched(self.fn, args, kwargs), moved))

    monkeypatch.setattr(interpreter_builder, "create_masked_load", noted_load)
    monkeypatch.setattr(interpreter_builder, "create_masked_store", noted_store)
    monkeypatch.setattr(GridExecutor, "__call__", noted_run)
    return found


def drawn(*shape: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    return (x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x).requires_grad_()


def norm() -> NormParams:
    weight, bias = torch.ones(64, requires_grad=True), torch.zeros(64, requires_grad=True)
    moved = torch.zeros(64), torch.ones(64), torch.zeros((), dtype=torch.int64)
    return NormParams(weight, bias, *moved, views=2, momentum=0.1, eps=1e-5)


def residual(x: Tensor) -> tuple[Tensor, ...]:
    return batch_norm_add_relu(x, drawn(4, 64, 8, 8), norm())


OPERATIONS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "batch norm": lambda x: (batch_norm_act(x, norm(), relu=True),),
    "batch norm, residual": residual,
    "batch norm, pooling": lambda x: batch_norm_relu_pool(x, norm()),
    "max pool": max_pool,
    "1x1 convolution": lambda x: pointwise_statistics(x, drawn(64, 64, 1, 1), norm())[:1],
    "stem": lambda x: (stem_convolution(x[:, :3].detach(), drawn(8, 3, 7, 7)),),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=[*OPERATIONS])
def test_a_launch_touches_the_bytes_that_are_counted(
    operation: Callable[[Tensor], tuple[Tensor, ...]], touched: Touched
) -> None:
    results = operation(drawn(4, 64, 8, 8))
    sum((x.float().square().sum() for x in results), torch.zeros(())).backward()
    assert touched
    for kernel, counted, moved in touched:
        assert counted == pytest.approx(moved, rel=3e-3), kernel  # without a ReLU no bias is read, but it is counted


def test_a_step_of_lars_touches_the_bytes_that_are_counted(touched: Touched) -> None:
    shapes = ((3 * BLOCK,), (2 * BLOCK + 100,))
    params, grads, momenta, targets = ([torch.ones(shape) for shape in shapes] for _ in range(4))
    group = LarsGroup(params, grads, momenta, [targets[0], None], LarsRates(0.1, 0.9, 0.01, 0.1, 0.9))
    lars_ema_([group], skipped=torch.zeros(2, dtype=torch.int32), workspace=Workspace())
    norms, _, sweep = touched  # between them, ratios: of tables alone, most columns of which are not read
    for kernel, counted, moved in (norms, sweep):
        assert counted == pytest.approx(moved, rel=3e-3), kernel
