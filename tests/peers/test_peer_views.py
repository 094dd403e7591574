"""Laws of view operations where ours and torchvision's are defined alike."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from fastbyol.kernels import reference
from tests.support.tolerances import FLOAT64, TORCHVISION_BLUR, TORCHVISION_HUE, TORCHVISION_NORMALIZE

pytestmark = pytest.mark.peers

DRAWN = torch.ones(3, dtype=torch.bool)


@pytest.fixture
def x() -> Tensor:
    """Return three images of 60 pixels in [0, 1]."""
    return torch.rand(3, 3, 60, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("delta", [-0.1, -0.03, 0.0, 0.07, 0.5])
def test_hue_turns_as_torchvisions(functional: ModuleType, x: Tensor, delta: float) -> None:
    ours = reference.hue(x, torch.full((3,), delta, dtype=x.dtype))
    assert (ours - functional.adjust_hue(x, delta)).abs().max() < TORCHVISION_HUE


def test_luma_is_torchvisions(functional: ModuleType, x: Tensor) -> None:
    theirs = functional.rgb_to_grayscale(x, num_output_channels=3)
    assert (reference.grayscale(x, DRAWN) - theirs).abs().max() < FLOAT64


def test_solarize_at_one_half_is_torchvisions(functional: ModuleType, x: Tensor) -> None:
    assert (reference.solarize(x, DRAWN) - functional.solarize(x, 0.5)).abs().max() < FLOAT64


@pytest.mark.parametrize("sigma", [0.2, 1.0, 2.0])
def test_blur_is_torchvisions_away_from_the_border(functional: ModuleType, x: Tensor, sigma: float) -> None:
    radius = 60 // 20  # ours pads with zeros, torchvision by reflection
    inside = slice(radius, -radius)
    ours = reference.gaussian_blur(x, torch.full((3,), sigma, dtype=x.dtype), DRAWN)
    theirs = functional.gaussian_blur(x, [2 * radius + 1] * 2, [sigma] * 2)
    assert (ours - theirs)[:, :, inside, inside].abs().max() < TORCHVISION_BLUR


def test_normalisation_is_torchvisions(functional: ModuleType, x: Tensor) -> None:
    theirs = functional.normalize(x, list(reference.IMAGENET_MEAN), list(reference.IMAGENET_STD))
    assert (reference.normalize(x, out=torch.empty_like(x)) - theirs).abs().max() < TORCHVISION_NORMALIZE


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("box", [(0, 0, 60, 60), (7, 3, 20, 16), (59, 59, 1, 1), (0, 20, 33, 40)])
def test_an_enlarged_crop_is_torchvisions(functional: ModuleType, box: tuple[int, int, int, int], flip: bool) -> None:
    """Torchvision uses Keys' a = -1/2 and drops taps outside the crop only with antialias, which enlarging ignores."""
    image = torch.randint(0, 256, (60, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    ours = reference.random_resized_crop(
        image.flatten(),
        torch.tensor([0]),
        torch.tensor([[60, 60]]),
        torch.tensor([[box]]),
        torch.tensor([[flip]]),
        crop_px=64,
        dtype=torch.float64,
    )[0]
    whole = image.movedim(-1, 0).double() / 255
    theirs = functional.resized_crop(whole, *box, [64, 64], interpolation=_bicubic(functional), antialias=True)
    theirs = functional.horizontal_flip(theirs) if flip else theirs
    assert (ours - theirs.clamp(0, 1)).abs().max() < FLOAT64


def _bicubic(functional: ModuleType) -> object:  # noqa: ARG001  # torchvision must have been imported its way
    from torchvision.transforms import InterpolationMode  # noqa: PLC0415

    return InterpolationMode.BICUBIC
