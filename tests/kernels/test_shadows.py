"""Laws of the copies that LARS's sweep writes: they are its parameters and targets, rounded, and it moves the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from triton import knobs

from fastbyol.kernels.lars_ema import Workspace, lars_ema_
from fastbyol.kernels.reference import LarsGroup, LarsRates
from fastbyol.kernels.segments import BLOCK
from fastbyol.kernels.shadows import Shadows

pytestmark = pytest.mark.usefixtures("poisoned")
RATES = LarsRates(lr=0.5, momentum=0.9, weight_decay=0.01, trust=0.1, tau=0.75)
SHAPES = ((1,), (3, 5), (8, 3, 3, 3), (BLOCK,), (2 * BLOCK + 6,), (7, 1, 1, 2))


def tensors(device: str, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [(x.to(memory_format=torch.channels_last) if x.ndim == 4 else x).to(device) for x in drawn]


def groups(device: str) -> list[LarsGroup]:
    """Make two groups; the last tensor of each has no target."""
    made = []
    for k in range(2):
        p, g, u, target = (tensors(device, seed) for seed in range(4 * k, 4 * k + 4))
        made.append(LarsGroup(p, g, u, [*target[:-1], None], RATES))
    return made


def shadows_of(made: list[LarsGroup]) -> Shadows:
    return Shadows([p for group in made for p in group.params], [x for group in made for x in group.targets])


def state(made: list[LarsGroup]) -> list[Tensor]:
    return [x for group in made for x in (*group.params, *group.momenta, *group.targets) if x is not None]


def rounded(x: Tensor) -> Tensor:
    """Round to bfloat16 as the kernel does: on a GPU as torch, in Triton's interpreter, which cuts bits off, so."""
    if not knobs.runtime.interpret:
        return x.bfloat16()
    return (x.view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()


def counter(device: str) -> Tensor:
    return torch.zeros(2, dtype=torch.int32, device=device)


def test_copies_are_the_rounded_tensors_after_every_step(device: str, launches: list[str]) -> None:
    made, workspace = groups(device), Workspace()
    shadows = shadows_of(made)
    assert len(shadows.of) == 2 * (2 * len(SHAPES) - 1)
    for _ in range(2):
        lars_ema_(made, skipped=counter(device), workspace=workspace, shadows=shadows)
        for x, copied in shadows.of.items():
            assert copied.dtype == torch.bfloat16
            assert copied.stride() == x.stride()
            assert torch.equal(copied, rounded(x))
    assert len(launches) == 2 * 3


def test_a_sweep_that_writes_copies_moves_the_same(device: str) -> None:
    made = groups(device)
    others = copy.deepcopy(made)
    lars_ema_(made, skipped=counter(device), workspace=Workspace(), shadows=shadows_of(made))
    lars_ema_(others, skipped=counter(device), workspace=Workspace())
    assert all(torch.equal(*pair) for pair in zip(state(made), state(others), strict=True))


def test_a_skipped_step_writes_none(device: str) -> None:
    made = groups(device)
    shadows, skipped = shadows_of(made), counter(device)
    made[1].grads[4][-1] = torch.nan
    lars_ema_(made, skipped=skipped, workspace=Workspace(), shadows=shadows)
    assert skipped.tolist() == [1, 1]
    assert all(torch.equal(copied, x.bfloat16()) for x, copied in shadows.of.items())  # torch's, of before


def test_what_changes_outside_the_sweep_is_copied_anew(device: str) -> None:
    made = groups(device)
    shadows = shadows_of(made)
    lars_ema_(made, skipped=counter(device), workspace=Workspace(), shadows=shadows)
    changed = made[0].params[2]
    changed.mul_(3)
    assert not torch.equal(shadows.of[changed], changed.bfloat16())
    shadows.refresh_()
    assert torch.equal(shadows.of[changed], changed.bfloat16())


def test_a_backward_through_an_overwritten_copy_is_refused(device: str) -> None:
    made = groups(device)
    shadows = shadows_of(made)
    x = torch.ones(3, 5, dtype=torch.bfloat16, device=device, requires_grad=True)
    loss = (x * shadows.of[made[0].params[1]]).sum()
    lars_ema_(made, skipped=counter(device), workspace=Workspace(), shadows=shadows)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_other_tensors_and_other_layouts_are_refused(device: str) -> None:
    made = groups(device)
    shadows = shadows_of(made)
    twin = copy.deepcopy(made)
    for others in (twin, made[:1]):
        with pytest.raises(ValueError, match="other parameters or targets"):
            lars_ema_(others, skipped=counter(device), workspace=Workspace(), shadows=shadows)
    for moved in (made[0].params[2], made[0].momenta[2], made[0].targets[2]):
        assert moved is not None
        moved.data = moved.contiguous()
    with pytest.raises(ValueError, match="memory layout"):
        lars_ema_(made, skipped=counter(device), workspace=Workspace(), shadows=shadows)
