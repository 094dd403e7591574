"""Laws of the kernels that make views: every pixel is that of the reference in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastbyol import views
from fastbyol.config import ViewConfig
from fastbyol.kernels import reference
from fastbyol.kernels.augment import augment
from fastbyol.kernels.blur import blur_down, finish
from fastbyol.kernels.view_params import ViewParams
from tests.support.tolerances import BF16_ULP, FLOAT16_PLANES, FLOAT32_KERNEL_VIEW

Image = NDArray[np.uint8]
Packed = tuple[Tensor, Tensor, Tensor]
COLUMNS = {"flip": 4, "jitter": 5, "grayscale": 6, "blur": 7, "solarize": 8, "sigma": 9, "factors": 10, "order": 14}
NEUTRAL = (0.0, 1.0, 1.0, 0.0)
IN_TURN = (0.0, 1.0, 2.0, 3.0)
PAPER = (ViewConfig(), ViewConfig(blur=0.1, solarize=0.2))


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, between the kernels too: what none of them wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def random_image(height: int, width: int, *, seed: int = 0) -> Image:
    """Draw pixels, of which the first are black, white, gray and primary colours."""
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    special = [(0, 0, 0), (255, 255, 255), (128, 128, 128), (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 51, 51)]
    kept = min(len(special), height * width)
    image.reshape(-1, 3)[:kept] = special[:kept]
    return image


def pack(images: list[Image], device: str) -> Packed:
    """Return pixels, offsets and sizes of images packed one after another."""
    pixels = torch.from_numpy(np.concatenate([image.reshape(-1) for image in images]))
    offsets = torch.tensor([0, *itertools.accumulate(image.size for image in images[:-1])])
    return pixels.to(device), offsets.to(device), torch.tensor([image.shape[:2] for image in images]).to(device)


def one_view(boxes: list[tuple[int, ...]] | Tensor, **drawn: object) -> ViewParams:
    """Crop each image and do what `drawn` says, by column: one value for all images or one for each."""
    packed = ViewParams.crops_only(torch.as_tensor(boxes)).packed
    for name, value in ({"factors": NEUTRAL, "order": IN_TURN} | drawn).items():
        columns = slice(COLUMNS[name], COLUMNS[name] + (4 if name in ("factors", "order") else 1))
        values = torch.as_tensor(value, dtype=torch.float32)
        is_per_image = values.ndim == (2 if name in ("factors", "order") else 1)
        packed[0, :, columns] = values.view(len(boxes), -1) if is_per_image else values
    return ViewParams(packed)


def whole(images: list[Image]) -> list[tuple[int, ...]]:
    return [(0, 0, *image.shape[:2]) for image in images]


def checked(packed: Packed, params: ViewParams, *, crop_px: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Make the views by the kernels, into NaN, and compare them with the reference in float64."""
    params = params.to(packed[0].device)
    count = params.packed.shape[:2].numel()
    out = torch.full((count, 3, crop_px, crop_px), torch.nan, dtype=dtype, device=packed[0].device)
    out = out.to(memory_format=torch.channels_last)
    assert augment(*packed, params, crop_px=crop_px, dtype=dtype, out=out) is out
    want = reference.augment(*packed, params, crop_px=crop_px, dtype=torch.float64)
    tolerance = FLOAT32_KERNEL_VIEW if dtype == torch.float32 else FLOAT16_PLANES
    ulp = BF16_ULP * want.abs() if dtype == torch.bfloat16 else 0  # the interpreter truncates to bfloat16
    assert ((out.double() - want).abs() <= tolerance + ulp).all()
    return out


SIZES = np.array([[30, 41], [1, 1], [9, 64], [50, 23]])


@pytest.mark.parametrize(
    ("crop_px", "dtype"), [(1, torch.float32), (17, torch.float32), (24, torch.bfloat16), (13, torch.float16)], ids=str
)
def test_both_views_equal_the_reference(crop_px: int, dtype: torch.dtype, device: str) -> None:
    packed = pack([random_image(*size, seed=k) for k, size in enumerate(SIZES)], device)
    count = len(SIZES)
    params = views.draw(PAPER, seed=1, epochs=np.zeros(count, int), indices=np.arange(count), sizes=SIZES)
    checked(packed, params, crop_px=crop_px, dtype=dtype)


@pytest.mark.parametrize("crop_px", [33, 40])
def test_an_output_larger_than_a_tile_and_no_multiple_of_it(crop_px: int, device: str) -> None:
    image = random_image(37, 45)
    drawn = {"flip": 1, "jitter": 1, "blur": 1, "sigma": 1.7, "factors": (0.1, 1.3, 0.8, 0.07), "order": (3, 1, 2, 0)}
    params = one_view([(3, 2, 30, 41)], **drawn)
    checked(pack([image], device), params, crop_px=crop_px)


CROPS = [
    ((5, 7), (2, 3, 1, 1)),
    ((1, 1), (0, 0, 1, 1)),
    ((6, 9), (3, 0, 1, 9)),
    ((13, 17), (0, 0, 13, 17)),
    ((9, 9), (0, 0, 9, 9)),
    ((12, 10), (3, 2, 5, 4)),
    ((41, 57), (4, 5, 33, 50)),
    ((40, 6), (1, 1, 38, 3)),
    ((9, 9), (6, 5, 3, 4)),
    ((2, 2), (0, 0, 2, 2)),
]


def test_crops_of_any_shape_and_their_mirrors(device: str) -> None:
    packed = pack([random_image(*size, seed=k) for k, (size, _) in enumerate(CROPS)], device)
    plain, mirrored = (one_view([box for _, box in CROPS], flip=flip) for flip in (0, 1))
    params = ViewParams(torch.cat((plain.packed, mirrored.packed)))
    checked(packed, params, crop_px=9)


def test_enlarging_equals_torch_antialiased_bicubic_which_is_keys_then(device: str) -> None:
    image = random_image(6, 7)
    got = augment(*pack([image], device), one_view(whole([image])).to(device), crop_px=16, dtype=torch.float32)
    window = torch.from_numpy(image).permute(2, 0, 1)[None].double() / 255
    want = F.interpolate(window, (16, 16), mode="bicubic", antialias=True).clamp(0, 1)
    want = reference.normalize(want, out=torch.empty_like(want))
    assert (got.cpu().double() - want).abs().max() < FLOAT32_KERNEL_VIEW


@pytest.mark.parametrize("spare", [0, 1, 2, 3])
def test_an_image_may_begin_and_end_at_any_byte(spare: int, device: str) -> None:
    images = [random_image(3, 5, seed=k) for k in range(4)]
    pixels, offsets, sizes = pack(images, device)
    sliced = torch.cat((pixels.new_full((spare,), 99), pixels))[spare:]
    checked((sliced, offsets, sizes), one_view(whole(images)), crop_px=6)
    gaps = torch.cat([torch.cat((part, pixels.new_full((spare,), 99))) for part in pixels.split(45)])
    spread = (gaps, offsets + spare * torch.arange(4, device=device), sizes)
    checked(spread, one_view(whole(images)), crop_px=6)


def test_taps_stop_at_the_box(device: str) -> None:
    image, painted = random_image(12, 12), random_image(12, 12, seed=1)
    painted[3:8, 4:10] = image[3:8, 4:10]
    params = one_view([(3, 4, 5, 6)] * 2).to(device)
    first, second = augment(*pack([image, painted], device), params, crop_px=8, dtype=torch.float32)
    assert torch.equal(first, second)


def test_an_offset_may_exceed_32_bits(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    image = random_image(5, 6)
    start = 2**31 + 5
    far = torch.empty(start + image.size, dtype=torch.uint8, device=device)  # pages never touched take no memory
    far[start:] = torch.from_numpy(image.reshape(-1))
    near = pack([image], device)
    params = one_view(whole([image])).to(device)
    offsets = torch.tensor([start], device=device)
    got = augment(far, offsets, near[2], params, crop_px=8, dtype=torch.float32)
    assert torch.equal(got, augment(*near, params, crop_px=8, dtype=torch.float32))


def test_boxes_that_are_empty_or_outside_give_numbers(device: str) -> None:
    images = [random_image(4, 5)] * 5
    boxes = [(0, 0, 0, 0), (-3, -9, 2, 2), (90, 90, 3, 3), (2, 2, 50, 50), (-2, 3, 4, 0)]
    x = augment(*pack(images, device), one_view(boxes).to(device), crop_px=8, dtype=torch.float32)
    assert x.isfinite().all()


def test_jitter_follows_each_of_the_24_orders(device: str) -> None:
    orders = list(itertools.permutations(range(4)))
    images = [random_image(8, 8, seed=k) for k in range(24)]
    factors = np.random.default_rng(0).uniform((-0.4, 0.6, 0.8, -0.1), (0.4, 1.4, 1.2, 0.1), (24, 4))
    params = one_view(whole(images), jitter=np.arange(24) % 8 != 7, factors=factors, order=orders)
    checked(pack(images, device), params, crop_px=8)


STRENGTHS = ((-0.4, 0.4, 1.0), (0.0, 0.6, 1.4), (0.0, 0.8, 3.0), (-0.5, 0.1, 0.99))


@pytest.mark.parametrize("operation", range(4), ids=["brightness", "contrast", "saturation", "hue"])
def test_a_colour_operation_alone(operation: int, device: str) -> None:
    gray = np.repeat(np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8, 1), 3, axis=2)
    images = [random_image(8, 8), random_image(8, 8, seed=1), gray]
    factors = np.tile(NEUTRAL, (3, 1))
    factors[:, operation] = STRENGTHS[operation]
    params = one_view(whole(images), jitter=1, factors=factors)
    checked(pack(images, device), params, crop_px=8)


def test_black_and_white_images(device: str) -> None:
    images = [np.full((5, 6, 3), value, dtype=np.uint8) for value in (0, 255)]
    drawn = {"jitter": 1, "blur": 1, "sigma": 0.5, "solarize": (0, 1), "factors": (0, 1.4, 1.2, 0.1)}
    checked(pack(images, device), one_view(whole(images), **drawn), crop_px=20)


@pytest.mark.parametrize("name", ["grayscale", "solarize"])
def test_an_operation_acts_only_where_drawn(name: str, device: str) -> None:
    images = [random_image(7, 8)] * 2
    packed = pack(images, device)
    drawn, other = checked(packed, one_view(whole(images), **{name: (1, 0)}), crop_px=8)
    plain = checked(packed, one_view(whole(images)), crop_px=8)
    assert torch.equal(other, plain[1])
    assert not torch.equal(drawn, plain[0])


@pytest.mark.parametrize(
    ("crop_px", "sigma"), [(1, 1.0), (19, 1.0), (20, 0.7), (60, 0.2)], ids=["1-pixel", "1-tap", "3-taps", "5-of-7-taps"]
)
def test_blur_acts_only_where_drawn(crop_px: int, sigma: float, device: str) -> None:
    images = [random_image(15, 12)] * 2
    drawn, other = checked(pack(images, device), one_view(whole(images), blur=(1, 0), sigma=sigma), crop_px=crop_px)
    assert torch.equal(drawn, other) == (crop_px < 20)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.3, 2.0])
def test_blur_at_the_papers_side(sigma: float, device: str) -> None:
    """Eleven taps on a side, of which a sigma of 1.3 needs the first eight."""
    side = 224
    planes = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    params = one_view([(0, 0, side, side)], blur=1, sigma=sigma).to(device)
    out = torch.empty_like(planes, memory_format=torch.channels_last)
    blocks = {} if planes.is_cuda else {"block": 2**16}  # the interpreter's time goes by programs
    finish(planes, blur_down(planes, params, **blocks), params, out=out, **blocks)
    want = reference.gaussian_blur(planes.double(), params.sigma[0].double(), params.blur[0])
    want = reference.normalize(want, out=torch.empty_like(want))
    assert (out.double() - want).abs().max() < FLOAT32_KERNEL_VIEW


@pytest.mark.parametrize(("count", "crop_px"), [(1, 40), (3, 7)])
def test_both_views_are_four_launches_whatever_the_sizes(
    count: int, crop_px: int, device: str, launches: list[str]
) -> None:
    sizes = SIZES[:count]
    packed = pack([random_image(*size) for size in sizes], device)
    drawn = views.draw(PAPER, seed=1, epochs=np.zeros(count, int), indices=np.arange(count), sizes=sizes)
    augment(*packed, drawn.to(device), crop_px=crop_px, dtype=torch.bfloat16)
    assert launches == ["crop_kernel", "color_kernel", "blur_down_kernel", "finish_kernel"]


def test_a_view_is_bit_equal_in_any_batch_and_any_run(device: str) -> None:
    sizes = np.array([[20, 30], [8, 8], [31, 9]])
    pixels, offsets, sizes_ = pack([random_image(*size, seed=k) for k, size in enumerate(sizes)], device)
    params = views.draw(PAPER, seed=4, epochs=np.zeros(3, int), indices=np.arange(3), sizes=sizes).to(device)

    def make(chosen: list[int]) -> Tensor:
        part = ViewParams(params.packed[:, chosen])
        x = augment(pixels, offsets[chosen], sizes_[chosen], part, crop_px=8, dtype=torch.bfloat16)
        return x.unflatten(0, (2, len(chosen)))

    everything = make([0, 1, 2])
    assert torch.equal(make([0, 1, 2]), everything)
    assert torch.equal(make([2, 0]), everything[:, [2, 0]])
    assert torch.equal(make([1]), everything[:, [1]])


def test_arguments_need_not_be_contiguous(device: str) -> None:
    images = [random_image(4, 5, seed=k) for k in range(3)]
    pixels, offsets, sizes = pack(images, device)
    params = one_view(whole(images), flip=(0, 1, 0), solarize=1).to(device)
    strided = [torch.stack((t, torch.zeros_like(t)), -1)[..., 0] for t in (pixels, offsets, sizes.int(), params.packed)]
    got = augment(*strided[:3], ViewParams(strided[3]), crop_px=6, dtype=torch.float32)
    assert torch.equal(got, augment(pixels, offsets, sizes, params, crop_px=6, dtype=torch.float32))


@pytest.mark.parametrize("margin", [1.0, 224 / 256])
def test_center_view_equals_the_reference(margin: float, device: str) -> None:
    packed = pack([random_image(12, 20), random_image(17, 9, seed=1)], device)
    x = views.center_view(*packed, crop_px=10, margin=margin)
    want = views.center_view(*packed, crop_px=10, margin=margin, dtype=torch.float64)
    assert (x.double() - want).abs().max() < FLOAT32_KERNEL_VIEW
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_an_empty_batch_gives_no_views(device: str) -> None:
    nothing = torch.zeros(0, 2, dtype=torch.long, device=device)
    params = ViewParams(torch.zeros(2, 0, 18, device=device))
    pixels = torch.zeros(0, dtype=torch.uint8, device=device)
    assert augment(pixels, nothing[:, 0], nothing, params, crop_px=4, dtype=torch.float32).shape == (0, 3, 4, 4)
