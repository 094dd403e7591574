"""Laws of the view operations: each is held to a definition written another way (NumPy loops, colorsys, Pillow)."""

from __future__ import annotations

import colorsys
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastbyol.kernels import reference
from tests.support.tolerances import FLOAT32_HSV, FLOAT32_OP, FLOAT64, PILLOW

Box = tuple[int, int, int, int]


def images(count: int, height: int, width: int, *, seed: int = 0) -> Tensor:
    """Return [count, 3, height, width] float64 in [0, 1], with exact black, white, gray and primary pixels."""
    rng = np.random.default_rng(seed)
    x = rng.random((count, 3, height, width))
    special = np.array(
        [[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 0.2, 0.2]]
    )
    flat = x.reshape(count, 3, -1)
    kept = min(len(special), flat.shape[2])
    flat[:, :, :kept] = special[:kept].T
    return torch.from_numpy(x)


def pack(arrays: list[NDArray[np.uint8]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return pixels, offsets and sizes of HWC images packed one after another."""
    lengths = [array.size for array in arrays]
    pixels = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays]))
    offsets = torch.tensor([0, *itertools.accumulate(lengths[:-1])])
    return pixels, offsets, torch.tensor([array.shape[:2] for array in arrays])


def random_image(height: int, width: int, *, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def crop_one(
    image: NDArray[np.uint8], box: Box, *, crop_px: int, flip: bool = False, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Crop one box of one image: [3, crop_px, crop_px]."""
    x = reference.random_resized_crop(
        *pack([image]), torch.tensor([[box]]), torch.tensor([[flip]]), crop_px=crop_px, dtype=dtype
    )
    return x[0]


def keys(distance: float) -> float:
    """Evaluate Keys' cubic with a = -1/2 as his paper writes it."""
    s = abs(distance)
    if s < 1:
        return 1.5 * s**3 - 2.5 * s**2 + 1
    return -0.5 * s**3 + 2.5 * s**2 - 4 * s + 2 if s < 2 else 0.0


def resample_line(line: NDArray[np.float64], out_px: int) -> NDArray[np.float64]:
    """Resample the first axis pixel by pixel: every source pixel weighed by its distance, weights renormalised."""
    result = []
    for i in range(out_px):
        centre = (i + 0.5) * len(line) / out_px - 0.5
        weights = np.array([keys(centre - j) for j in range(len(line))])
        result.append(np.tensordot(weights / weights.sum(), line, axes=(0, 0)))
    return np.array(result)


def naive_crop(image: NDArray[np.uint8], box: Box, *, crop_px: int, flip: bool) -> NDArray[np.float64]:
    top, left, height, width = box
    window = image[top : top + height, left : left + width].astype(np.float64) / 255
    columns = resample_line(window, crop_px)
    x = resample_line(columns.swapaxes(0, 1), crop_px).swapaxes(0, 1)
    x = x[:, ::-1] if flip else x
    return np.clip(x, 0, 1).transpose(2, 0, 1)


CROPS = {
    "one-pixel": ((5, 7), (2, 3, 1, 1), 8),
    "one-pixel-image": ((1, 1), (0, 0, 1, 1), 5),
    "one-row": ((6, 9), (3, 0, 1, 9), 7),
    "full": ((13, 17), (0, 0, 13, 17), 11),
    "same-size": ((8, 8), (0, 0, 8, 8), 8),
    "up": ((12, 10), (3, 2, 5, 4), 16),
    "down": ((41, 57), (4, 5, 33, 50), 9),
    "up-and-down": ((40, 6), (1, 1, 38, 3), 12),
    "to-one-pixel": ((9, 6), (1, 1, 7, 5), 1),
    "corner": ((9, 9), (6, 5, 3, 4), 6),
}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("size", "box", "crop_px"), CROPS.values(), ids=CROPS.keys())
def test_crop_equals_a_naive_resampling(size: tuple[int, int], box: Box, crop_px: int, flip: bool) -> None:
    image = random_image(*size)
    want = naive_crop(image, box, crop_px=crop_px, flip=flip)
    x = crop_one(image, box, crop_px=crop_px, flip=flip)
    assert np.abs(x.numpy() - want).max() < FLOAT64
    x32 = crop_one(image, box, crop_px=crop_px, flip=flip, dtype=torch.float32)
    assert x32.dtype == torch.float32
    assert np.abs(x32.numpy() - want).max() < FLOAT32_OP


def test_enlarging_equals_torch_antialiased_bicubic_which_is_keys_then() -> None:
    image = random_image(14, 19)
    window = torch.from_numpy(image).permute(2, 0, 1)[None].double() / 255
    want = F.interpolate(window, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)[0]
    assert (crop_one(image, (0, 0, 14, 19), crop_px=32) - want).abs().max() < FLOAT64


def test_enlarging_equals_pillow() -> None:
    image = random_image(11, 9)
    x = crop_one(image, (2, 1, 7, 8), crop_px=24)
    for channel in range(3):
        window = Image.fromarray((image[2:9, 1:9, channel] / 255).astype(np.float32), mode=None)
        want = np.asarray(window.resize((24, 24), Image.Resampling.BICUBIC)).clip(0, 1)
        assert np.abs(x[channel].numpy() - want).max() < PILLOW


def test_a_crop_at_source_size_is_the_source() -> None:
    image = random_image(10, 12)
    x = crop_one(image, (2, 3, 7, 7), crop_px=7)
    assert np.abs(x.numpy() - image[2:9, 3:10].transpose(2, 0, 1) / 255).max() < FLOAT64


def test_taps_stop_at_the_window() -> None:
    image = random_image(20, 20)
    painted = random_image(20, 20, seed=1)
    painted[5:12, 6:14] = image[5:12, 6:14]
    box = (5, 6, 7, 8)
    assert torch.equal(crop_one(image, box, crop_px=15), crop_one(painted, box, crop_px=15))


def test_overshoot_is_clipped() -> None:
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    image[:, 4:] = 255
    x = crop_one(image, (0, 0, 8, 8), crop_px=29)
    assert (x.min(), x.max()) == (0, 1)
    assert ((x == 0) | (x == 1)).float().mean() > 0.5


def test_mixed_sizes_in_one_buffer_equal_each_alone() -> None:
    shapes = [(5, 9), (1, 1), (30, 4), (17, 23), (8, 3)]
    arrays = [random_image(*shape, seed=k) for k, shape in enumerate(shapes)]
    boxes = torch.tensor(
        [[(0, 0, h, w) for h, w in shapes], [(h // 2, w // 3, 1 + h // 3, 1 + w // 3) for h, w in shapes]]
    )
    flip = torch.tensor([[False, True, False, True, False], [True, False, True, False, True]])
    x = reference.random_resized_crop(*pack(arrays), boxes, flip, crop_px=13, dtype=torch.float64).view(2, 5, 3, 13, 13)
    for view, k in itertools.product(range(2), range(5)):
        box = tuple(boxes[view, k].tolist())
        want = naive_crop(arrays[k], box, crop_px=13, flip=bool(flip[view, k]))
        assert np.abs(x[view, k].numpy() - want).max() < FLOAT64


def test_images_may_lie_in_any_order_with_gaps_between() -> None:
    first, second = random_image(6, 7), random_image(9, 4, seed=1)
    gap = np.full(11, 77, dtype=np.uint8)
    pixels = torch.from_numpy(np.concatenate([second.reshape(-1), gap, first.reshape(-1)]))
    offsets, sizes = torch.tensor([second.size + gap.size, 0]), torch.tensor([[6, 7], [9, 4]])
    boxes = torch.tensor([[[0, 0, 6, 7], [1, 1, 8, 3]]])
    no_flip = torch.zeros(1, 2, dtype=torch.bool)
    x = reference.random_resized_crop(pixels, offsets, sizes, boxes, no_flip, crop_px=5, dtype=torch.float64)
    assert (x[0] - crop_one(first, (0, 0, 6, 7), crop_px=5)).abs().max() < FLOAT64
    assert (x[1] - crop_one(second, (1, 1, 8, 3), crop_px=5)).abs().max() < FLOAT64


def test_brightness_adds_and_clips() -> None:
    x = images(3, 4, 5)
    delta = torch.tensor([-0.4, 0.0, 0.4], dtype=torch.float64)
    want = np.clip(x.numpy() + delta.numpy().reshape(3, 1, 1, 1), 0, 1)
    assert np.abs(reference.brightness(x, delta).numpy() - want).max() < FLOAT64


def test_contrast_scales_about_each_channels_own_mean() -> None:
    x = images(3, 7, 5)
    factor = torch.tensor([0.6, 1.0, 1.4], dtype=torch.float64)
    got = reference.contrast(x, factor).numpy()
    for n, c in itertools.product(range(3), range(3)):
        plane = x[n, c].numpy()
        want = np.clip((plane - plane.mean()) * float(factor[n]) + plane.mean(), 0, 1)
        assert np.abs(got[n, c] - want).max() < FLOAT64


def through_hsv(x: Tensor, *, turn: float = 0.0, gain: float = 1.0) -> Tensor:
    """Change hue and saturation of every pixel by the standard library."""
    pixels = []
    for r, g, b in x.movedim(1, -1).reshape(-1, 3).tolist():
        h, s, v = colorsys.rgb_to_hsv(r, g, b)
        pixels.append(colorsys.hsv_to_rgb((h + turn) % 1, min(1, s * gain), v))
    return torch.tensor(pixels, dtype=x.dtype).view(len(x), *x.shape[2:], 3).movedim(-1, 1)


@pytest.mark.parametrize("turn", [-1.0, -0.4, -0.1, 0.0, 0.03, 0.1, 0.5, 0.99])
def test_hue_turns_as_colorsys(turn: float) -> None:
    x = images(2, 9, 9)
    want = through_hsv(x, turn=turn)
    assert (reference.hue(x, torch.full((2,), turn, dtype=x.dtype)) - want).abs().max() < FLOAT64
    assert (reference.hue(x.float(), torch.full((2,), turn)) - want).abs().max() < FLOAT32_HSV


@pytest.mark.parametrize("gain", [0.0, 0.8, 1.0, 1.2, 2.0])
def test_saturation_scales_as_colorsys(gain: float) -> None:
    x = images(2, 9, 9)
    want = through_hsv(x, gain=gain)
    assert (reference.saturation(x, torch.full((2,), gain, dtype=x.dtype)) - want).abs().max() < FLOAT64
    assert (reference.saturation(x.float(), torch.full((2,), gain)) - want).abs().max() < FLOAT32_HSV


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gray_has_no_hue_and_no_saturation_to_change(dtype: torch.dtype) -> None:
    x = torch.linspace(0, 1, 64, dtype=dtype).view(1, 1, 8, 8).expand(1, 3, 8, 8)
    assert torch.equal(reference.hue(x, torch.full((1,), 0.07, dtype=dtype)), x)
    assert torch.equal(reference.saturation(x, torch.full((1,), 1.2, dtype=dtype)), x)


def test_hue_keeps_value_and_chroma_to_the_bit() -> None:
    x = images(4, 16, 16).float()
    value, chroma = reference.value_and_chroma(reference.hue(x, torch.tensor([-0.1, -0.03, 0.05, 0.1])))
    assert torch.equal(value, x.amax(1))
    assert (chroma - (x.amax(1) - x.amin(1))).abs().max() < FLOAT32_OP


ALL_ORDERS = list(itertools.permutations(range(4)))


def test_jitter_follows_each_images_own_order_and_only_where_drawn() -> None:
    x = images(len(ALL_ORDERS) * 2, 5, 6)
    order = torch.tensor(ALL_ORDERS * 2)
    drawn = torch.arange(len(x)) % 3 != 0
    rng = np.random.default_rng(1)
    factors = torch.from_numpy(rng.uniform((-0.4, 0.6, 0.8, -0.1), (0.4, 1.4, 1.2, 0.1), (len(x), 4)))
    got = reference.color_jitter(x, factors, order, drawn)
    for n in range(len(x)):
        want = x[n : n + 1]
        for k in order[n].tolist() if drawn[n] else []:
            want = reference.JITTER[k](want, factors[n : n + 1, k])
        assert torch.equal(got[n], want[0])


def test_grayscale_is_luma_on_three_channels() -> None:
    x = images(2, 4, 4)
    got = reference.grayscale(x, torch.tensor([True, False]))
    luma = 0.2989 * x[0, 0] + 0.5870 * x[0, 1] + 0.1140 * x[0, 2]
    assert (got[0] - luma).abs().max() < FLOAT64
    assert torch.equal(got[1], x[1])


def naive_blur(plane: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    """Convolve one plane with a normalised two-dimensional Gaussian, zeros outside."""
    radius = int(plane.shape[0] / 20)
    axis = np.arange(-radius, radius + 1)
    kernel = np.exp(-(axis[:, None] ** 2 + axis**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    padded = np.pad(plane, radius)
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape)
    return np.einsum("ijkl,kl->ij", windows, kernel)


@pytest.mark.parametrize("side", [1, 19, 20, 32, 47, 96])
def test_blur_equals_a_dense_convolution(side: int) -> None:
    x = images(4, side, side)
    sigma = torch.tensor([0.1, 0.7, 1.3, 2.0], dtype=torch.float64)
    drawn = torch.tensor([True, True, False, True])
    got = reference.gaussian_blur(x, sigma, drawn)
    for n, c in itertools.product(range(4), range(3)):
        want = naive_blur(x[n, c].numpy(), float(sigma[n])) if drawn[n] else x[n, c].numpy()
        assert np.abs(got[n, c].numpy() - want).max() < FLOAT64
    assert (reference.gaussian_blur(x.float(), sigma.float(), drawn) - got).abs().max() < FLOAT32_OP


@pytest.mark.parametrize(("side", "taps"), [(224, 23), (128, 13), (32, 3), (19, 1)])
def test_blur_has_the_specified_number_of_taps(side: int, taps: int) -> None:
    matrix = reference.gaussian_matrix(torch.tensor([2.0], dtype=torch.float64), side=side)[0]
    assert int((matrix[side // 2] != 0).sum()) == taps
    assert math.isclose(float(matrix[side // 2].sum()), 1, abs_tol=FLOAT64)


def test_solarize_inverts_from_one_half_on() -> None:
    x = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).view(1, 1, 1, 5).expand(2, 3, 1, 5)
    got = reference.solarize(x, torch.tensor([True, False]))
    assert got[0, 0, 0].tolist() == [0, 0.25, 0.5, 0.25, 0]
    assert torch.equal(got[1], x[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalize_writes_channels_last(dtype: torch.dtype) -> None:
    x = images(2, 4, 5).to(dtype)
    out = torch.full((2, 3, 4, 5), math.nan, dtype=dtype).to(memory_format=torch.channels_last)
    reference.normalize(x, out=out)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    want = (x.double().numpy() - mean.reshape(3, 1, 1)) / std.reshape(3, 1, 1)
    assert np.abs(out.numpy() - want).max() < (FLOAT64 if dtype == torch.float64 else FLOAT32_OP)


def test_no_operation_writes_to_its_input_or_leaves_the_unit_interval() -> None:
    x = images(6, 20, 20).float()
    before, drawn = x.clone(), torch.tensor([True, False] * 3)
    factors = torch.tensor([0.4, 1.4, 1.2, 0.1]).expand(6, 4)
    results = [operation(x, factors[:, k]) for k, operation in enumerate(reference.JITTER)]
    results += [reference.color_jitter(x, factors, torch.tensor([ALL_ORDERS[5]] * 6), drawn)]
    results += [reference.grayscale(x, drawn), reference.solarize(x, drawn)]
    results += [reference.gaussian_blur(x, torch.full((6,), 0.5), drawn)]
    assert torch.equal(x, before)
    for result in results:
        assert result.min() >= 0
        assert result.max() <= 1


def test_nothing_drawn_changes_nothing() -> None:
    x = images(3, 8, 8)
    none = torch.zeros(3, dtype=torch.bool)
    assert torch.equal(reference.color_jitter(x, torch.ones(3, 4), torch.arange(4).expand(3, 4), none), x)
    assert torch.equal(reference.gaussian_blur(x, torch.ones(3), none), x)
    assert torch.equal(reference.grayscale(x, none), x)
    assert torch.equal(reference.solarize(x, none), x)
