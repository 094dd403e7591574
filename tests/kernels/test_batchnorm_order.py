"""Laws of the order in which batch norm's sums read rows, from the first or the last: every row once, equal sums."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbyol.kernels import batchnorm_statistics
from fastbyol.kernels.batchnorm import batch_norm_act, batch_norm_add_relu
from fastbyol.kernels.batchnorm_statistics import rows_of_split, sum_launch, summed_group
from fastbyol.kernels.reference import NormParams

pytestmark = pytest.mark.usefixtures("poisoned", "short_splits")
CHANNELS = 72  # two blocks of columns


@triton.jit
def walked_kernel(groups_ptr, rows_ptr, rows_per_split, FROM_TAIL: tl.constexpr, BM: tl.constexpr):
    """Write the group of a program and the rows it sums, in their order; grid (columns, S, G)."""
    program = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    tl.store(groups_ptr + program, summed_group(FROM_TAIL))
    for start in range(0, rows_per_split, BM):
        r = rows_of_split(start, rows_per_split, FROM_TAIL, BM)
        tl.store(rows_ptr + program * rows_per_split + start + tl.arange(0, BM), r)


def walk(x: Tensor, *, views: int) -> tuple[list[int], Tensor, int]:
    """Return the group that each program of the first column sums, their rows [G, S, steps, BM], and a view's rows."""
    (_, splits, groups), sizes = sum_launch(x, views, tile_bytes=512)
    bm, each = sizes["BM"], sizes["rows_per_split"]
    found = torch.full((groups, splits), -1, dtype=torch.int32, device=x.device)
    rows = torch.full((groups, splits, each // bm, bm), -1, dtype=torch.int32, device=x.device)
    walked_kernel[(1, splits, groups)](found, rows, each, FROM_TAIL=sizes["FROM_TAIL"], BM=bm)
    return found[:, 0].tolist(), rows, sizes["rows"]


@pytest.mark.parametrize("images", [1, 3, 8])
@pytest.mark.parametrize("from_tail", [False, True])
def test_every_row_is_summed_once(device: str, from_tail: bool, images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batchnorm_statistics, "FROM_TAIL", from_tail)
    monkeypatch.setattr(batchnorm_statistics, "PROGRAMS", 6)
    groups, rows, count = walk(torch.empty(2 * images, 64, 3, 5, device=device), views=2)
    assert sorted(groups) == [0, 1]
    for walked in rows:
        assert walked.flatten().sort().values[:count].tolist() == list(range(count))


def test_from_the_tail_all_programs_go_from_the_last_rows_to_the_first(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batchnorm_statistics, "FROM_TAIL", True)
    monkeypatch.setattr(batchnorm_statistics, "PROGRAMS", 3)
    groups, rows, _ = walk(torch.empty(32, 64, 3, 5, device=device), views=2)
    assert groups == [1, 0]
    _, splits, steps, bm = rows.shape
    assert splits == 3
    assert steps > 1
    for walked in rows.transpose(
        1, 2
    ):  # [steps, S, BM]: a step of all programs is a range, before that of the last step
        starts = walked[:, 0, 0].tolist()
        assert starts == [(steps - 1 - step) * splits * bm for step in range(steps)]
        assert torch.equal(
            walked.flatten(1) - walked[:, 0, :1], torch.arange(splits * bm, device=device).expand(steps, -1)
        )


def outcome(device: str, *, with_residual: bool) -> list[Tensor]:
    """Normalise numbers of mean 0 and variance 4 whose sums are exact in float32 in any order, as gradients' are."""
    generator = torch.Generator().manual_seed(0)

    def drawn(images: int) -> Tensor:
        return torch.randint(-4, 5, (images, CHANNELS, 4, 4), generator=generator).float()

    first, second = (2 * drawn(2).sign().add(0.5).sign() for _ in range(2))
    x, dz = torch.cat([first, -first, second, -second]), drawn(8)
    x, residual = (y.to(device).contiguous(memory_format=torch.channels_last).requires_grad_() for y in (x, drawn(8)))
    weight, bias = (torch.full((CHANNELS,), at, device=device, requires_grad=True) for at in (2.0, 0.25))
    moved = torch.zeros(CHANNELS, device=device), torch.ones(CHANNELS, device=device), torch.tensor(0, device=device)
    norm = NormParams(weight, bias, *moved, views=2, momentum=0.1, eps=0.0)
    z = batch_norm_add_relu(x, residual, norm)[0] if with_residual else batch_norm_act(x, norm, relu=True)
    z.backward(dz.to(device).contiguous(memory_format=torch.channels_last))
    gradients = [y.grad for y in (x, residual, weight, bias) if y.grad is not None]
    assert len(gradients) == 3 + with_residual
    return [z.detach(), *gradients, *moved]


@pytest.mark.parametrize("with_residual", [False, True])
def test_both_orders_give_the_same_bits_where_sums_are_exact(
    device: str, with_residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batchnorm_statistics, "PROGRAMS", 12)
    expected = outcome(device, with_residual=with_residual)
    monkeypatch.setattr(batchnorm_statistics, "FROM_TAIL", True)
    found = outcome(device, with_residual=with_residual)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
