"""Laws of folding batch norms into convolutions: the kernel's weights and biases are the reference's in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from fastbyol.kernels import reference
from fastbyol.kernels.fold_norms import Workspace, fold_norms
from fastbyol.kernels.reference import Fold, NormParams
from fastbyol.kernels.segments import BLOCK
from tests.support.tolerances import FLOAT32_BATCHNORM, HALF_ULPS

pytestmark = pytest.mark.usefixtures("poisoned")
SHAPES = ((1, 1, 1, 1), (5, 3, 3, 3), (8, 16, 1, 1), (3, BLOCK, 1, 1), (2, BLOCK // 9 + 1, 3, 3), (BLOCK + 1, 1, 1, 1))


def drawn(*shape: int, device: str, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def norm_of(channels: int, device: str, *, seed: int) -> NormParams:
    weight, bias, mean, var = (drawn(channels, device=device, seed=10 * seed + i) for i in range(4))
    return NormParams(weight, bias, mean, var.square(), None, views=2, momentum=0.1, eps=1e-5)


def folds_of(device: str, *, memory_format: torch.memory_format = torch.channels_last) -> list[Fold]:
    """Make a convolution of each shape, every other one with a shortcut."""
    return [
        Fold(
            drawn(*shape, device=device, seed=seed).contiguous(memory_format=memory_format),
            norm_of(shape[0], device, seed=seed),
            norm_of(shape[0], device, seed=seed + 100) if seed % 2 else None,
        )
        for seed, shape in enumerate(SHAPES)
    ]


def check(folds: list[Fold], workspace: Workspace, *, dtype: torch.dtype = torch.float32) -> None:
    """Fold through the kernel in this precision and through the reference in float64."""
    tolerance = FLOAT32_BATCHNORM + HALF_ULPS.get(dtype, 0.0)
    wanted = reference.fold_norms([double(fold) for fold in folds], dtype=torch.float64)
    for folded, expected, fold in zip(fold_norms(folds, dtype=dtype, workspace=workspace), wanted, folds, strict=True):
        assert folded.weight.dtype == folded.bias.dtype == dtype
        assert folded.weight.stride() == fold.weight.stride()
        assert folded.weight.data_ptr() % 16 == folded.bias.data_ptr() % 16 == 0
        for ours, theirs in zip(folded, expected, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=FLOAT32_BATCHNORM)


def double(fold: Fold) -> Fold:
    norms = [norm and norm._replace(**wide(norm)) for norm in (fold.norm, fold.shortcut)]
    return Fold(fold.weight.double(), *norms)


def wide(norm: NormParams) -> dict[str, Tensor]:
    return {name: getattr(norm, name).double() for name in ("weight", "bias", "running_mean", "running_var")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_folded_weights_are_the_references(
    dtype: torch.dtype, memory_format: torch.memory_format, device: str, launches: list[str]
) -> None:
    check(folds_of(device, memory_format=memory_format), Workspace(), dtype=dtype)
    assert launches == ["fold_norms_kernel"]


def test_what_moved_in_place_is_folded_anew_at_the_same_address(device: str) -> None:
    folds, workspace = folds_of(device), Workspace()
    before = [x.data_ptr() for x in fold_norms(folds, dtype=torch.float32, workspace=workspace)[1]]
    folds[1].weight.mul_(2)
    folds[1].norm.running_var.add_(1)
    check(folds, workspace)
    assert [x.data_ptr() for x in workspace.folded[1]] == before


def test_tensors_elsewhere_and_copies_are_found(device: str) -> None:
    folds, workspace = folds_of(device), Workspace()
    check(folds, workspace)
    folds[0] = folds[0]._replace(weight=folds[0].weight.clone() + 1)
    check(folds, workspace)
    copied = copy.deepcopy(workspace)
    check([fold._replace(weight=fold.weight.clone() - 1) for fold in folds], copied)
    check(folds, workspace)


def test_a_weight_that_starts_anywhere_folds_alike(device: str) -> None:
    folds, workspace = folds_of(device), Workspace()
    room = torch.empty(folds[3].weight.numel() + 1, device=device)
    folds[3] = folds[3]._replace(weight=room[1:].view(SHAPES[3]).copy_(folds[3].weight))
    check(folds, workspace)
    assert not workspace.is_aligned


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(4, 5, 1, 1).transpose(0, 1)}, "contiguous or channels-last"),
        ({"weight": torch.ones(5, 3, 3, 3, dtype=torch.bfloat16)}, "float32"),
        ({"weight": torch.ones(4, 3, 3, 3)}, "4 channels"),
    ],
    ids=["transposed", "bfloat16", "channels"],
)
def test_what_the_kernel_cannot_read_is_refused(change: dict[str, Tensor], message: str, device: str) -> None:
    fold = folds_of(device)[1]._replace(**{name: x.to(device) for name, x in change.items()})
    with pytest.raises(ValueError, match=message):
        fold_norms([fold], dtype=torch.float32, workspace=Workspace())
