"""Laws of fastbyol.views: what is drawn follows the specification, and a view depends on its own sample alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbyol import views
from fastbyol.config import ViewConfig
from fastbyol.kernels import reference
from fastbyol.kernels.view_params import ViewParams
from tests.support.tolerances import (
    BINOMIAL_SIGMAS,
    CHI_SQUARE_23,
    FLOAT32_PADDING,
    FLOAT32_VIEW,
    FLOAT64,
    KOLMOGOROV_SMIRNOV,
)

T = ViewConfig()
T_PRIME = ViewConfig(blur=0.1, solarize=0.2)
DRAWS = 20_000


def draw(indices: NDArray[np.int64], sizes: NDArray[np.int64], *, seed: int = 0, epoch: int = 0) -> ViewParams:
    epochs = np.full(len(indices), epoch)
    return views.draw((T, T_PRIME), seed=seed, epochs=epochs, indices=indices, sizes=sizes)


@pytest.fixture(scope="module")
def drawn() -> ViewParams:
    """Both views of DRAWS samples of 3000 x 4000 pixels, large enough that rounding sides to pixels does not show."""
    return draw(np.arange(DRAWS), np.tile([3000, 4000], (DRAWS, 1)))


def is_uniform(values: Tensor, low: float, high: float) -> bool:
    """Compare a sample with U(low, high) by the Kolmogorov-Smirnov distance."""
    u = np.sort((values.double().numpy() - low) / (high - low))
    n = len(u)
    above, below = np.arange(1, n + 1) / n - u, u - np.arange(n) / n
    return bool(max(above.max(), below.max()) < KOLMOGOROV_SMIRNOV / np.sqrt(n))


@pytest.mark.parametrize("view", [0, 1])
def test_area_and_log_ratio_are_uniform(drawn: ViewParams, view: int) -> None:
    height, width = drawn.boxes[view, :, 2:].double().unbind(1)
    sides_clamped = (height == 3000) | (width == 4000)
    assert is_uniform(
        torch.log(width / height)[~sides_clamped & (height * width < 0.5 * 12e6)], *np.log([3 / 4, 4 / 3])
    )
    small = height * width / 12e6
    assert is_uniform(small[small < 0.5], 0.08, 0.5)
    wanted, count = 0.42 / 0.92, int((small < 0.5).sum())
    assert abs(count - DRAWS * wanted) < BINOMIAL_SIGMAS * np.sqrt(DRAWS * wanted * (1 - wanted))


@pytest.mark.parametrize("view", [0, 1])
def test_position_is_uniform_over_all_that_fit(drawn: ViewParams, view: int) -> None:
    top, left, height, width = drawn.boxes[view].double().unbind(1)
    for start, free in ((top, 3000 - height), (left, 4000 - width)):
        has_room = free > 500
        assert is_uniform(((start + 0.5) / (free + 1))[has_room], 0, 1)


def test_every_position_of_a_small_image_is_reached() -> None:
    sizes = np.tile([5, 4], (2000, 1))
    top, left, height, width = draw(np.arange(2000), sizes).boxes[0].unbind(1)
    seen = {(int(a), int(b)) for a, b in zip(top[height == 2], left[height == 2], strict=True)}
    assert {a for a, _ in seen} == {0, 1, 2, 3}
    assert (top + height <= 5).all()
    assert (left + width <= 4).all()


@pytest.mark.parametrize(
    ("name", "chances"),
    [
        ("flip", (0.5, 0.5)),
        ("jitter", (0.8, 0.8)),
        ("grayscale", (0.2, 0.2)),
        ("blur", (1.0, 0.1)),
        ("solarize", (0.0, 0.2)),
    ],
)
def test_operations_are_drawn_as_often_as_specified(drawn: ViewParams, name: str, chances: tuple[float, float]) -> None:
    flags = getattr(drawn, name)
    assert flags.dtype == torch.bool
    for view, chance in enumerate(chances):
        spread = np.sqrt(DRAWS * chance * (1 - chance))
        assert abs(int(flags[view].sum()) - DRAWS * chance) <= BINOMIAL_SIGMAS * spread


@pytest.mark.parametrize("view", [0, 1])
def test_strengths_are_uniform_in_their_ranges(drawn: ViewParams, view: int) -> None:
    ranges = ((-0.4, 0.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1))
    for k, (low, high) in enumerate(ranges):
        assert is_uniform(drawn.factors[view, :, k], low, high)
    assert is_uniform(drawn.sigma[view], 0.1, 2.0)


@pytest.mark.parametrize("view", [0, 1])
def test_all_24_orders_are_equally_likely(drawn: ViewParams, view: int) -> None:
    order = drawn.order[view].long()
    assert torch.equal(order.sort(1).values, torch.arange(4).expand(DRAWS, 4))
    counts = torch.bincount((order * torch.tensor([64, 16, 4, 1])).sum(1))
    counts = counts[counts > 0].double()
    assert len(counts) == 24
    assert float(((counts - DRAWS / 24) ** 2 / (DRAWS / 24)).sum()) < CHI_SQUARE_23


def test_columns_samples_epochs_and_views_are_uncorrelated(drawn: ViewParams) -> None:
    next_epoch = draw(np.arange(DRAWS), np.tile([3000, 4000], (DRAWS, 1)), epoch=1)
    columns = [drawn.packed[0], drawn.packed[1], drawn.packed[0].roll(1, 0), next_epoch.packed[0]]
    varying = torch.cat([part[:, 9:14] for part in columns], 1).double().numpy()
    assert np.abs(np.corrcoef(varying.T) - np.eye(20)).max() < 5 / np.sqrt(DRAWS)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (2, 3), (500, 333)])
def test_boxes_lie_inside_the_image(size: tuple[int, int]) -> None:
    top, left, height, width = draw(np.arange(500), np.tile(size, (500, 1))).boxes.unbind(-1)
    assert (torch.stack((top, left)) >= 0).all()
    assert (torch.stack((height, width)) >= 1).all()
    assert (top + height <= size[0]).all()
    assert (left + width <= size[1]).all()
    assert torch.equal(top, top.round())


def test_the_full_area_at_the_image_ratio_is_the_whole_image() -> None:
    whole = ViewConfig(area=(1.0, 1.0), ratio=(1.0, 1.0))
    sizes = np.tile([37, 37], (9, 1))
    p = views.draw((whole, whole), seed=0, epochs=np.zeros(9, int), indices=np.arange(9), sizes=sizes)
    assert torch.equal(p.boxes, torch.tensor([0.0, 0, 37, 37]).expand(2, 9, 4))


def test_parameters_do_not_depend_on_the_batch() -> None:
    rng = np.random.default_rng(0)
    indices = rng.integers(0, 2**40, 50)
    epochs, sizes = rng.integers(0, 1000, 50), rng.integers(1, 600, (50, 2))
    whole = views.draw((T, T_PRIME), seed=5, epochs=epochs, indices=indices, sizes=sizes)
    part = rng.permutation(50)[:13]
    alone = views.draw((T, T_PRIME), seed=5, epochs=epochs[part], indices=indices[part], sizes=sizes[part])
    assert torch.equal(whole.packed[:, part], alone.packed)


def test_parameters_depend_on_seed_epoch_index_and_view() -> None:
    size = np.array([[400, 400]])
    draws = [
        draw(np.array([index]), size, seed=seed, epoch=epoch).packed[view, 0, 9:14]
        for index, seed, epoch, view in itertools.product((0, 1, 2**32), (0, 1, 2**32), (0, 1), (0, 1))
    ]
    assert len({tuple(values.tolist()) for values in draws}) == len(draws)


def test_draws_stay_what_they_were() -> None:
    """Pin two samples: a change here breaks resuming and comparing older runs."""
    p = draw(np.array([0, 123_456]), np.array([[32, 32], [375, 500]]), seed=42, epoch=7)
    assert p.packed[0, 0, :9].tolist() == [5, 3, 19, 24, 0, 0, 0, 1, 0]
    assert p.packed[0, 0, 14:].tolist() == [2, 1, 0, 3]
    assert p.packed[1, 1, :9].tolist() == [0, 46, 375, 346, 0, 1, 0, 0, 1]
    assert p.packed[1, 1, 14:].tolist() == [2, 1, 3, 0]


def packed_images(sizes: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
    """Return pixels, offsets and sizes of random images of these sizes."""
    lengths = sizes.prod(1) * 3
    pixels = np.random.default_rng(0).integers(0, 256, lengths.sum(), dtype=np.uint8)
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return torch.from_numpy(pixels), torch.from_numpy(offsets), torch.from_numpy(sizes)


MIXED = np.array([[32, 32], [1, 1], [40, 17], [9, 64], [3, 5], [50, 50], [28, 31]])


@pytest.mark.parametrize("crop_px", [1, 17, 32, 64])
def test_views_equal_the_operations_one_image_at_a_time(crop_px: int) -> None:
    """Compose the reference operations sample by sample in the specified order."""
    pixels, offsets, sizes = packed_images(MIXED)
    params = draw(np.arange(7), MIXED, seed=1)
    x = views.apply(pixels, offsets, sizes, params, crop_px=crop_px, dtype=torch.float64).view(
        2, 7, 3, crop_px, crop_px
    )
    for view, b in itertools.product(range(2), range(7)):
        p = ViewParams(params.packed[view : view + 1, b : b + 1])
        want = reference.random_resized_crop(
            pixels, offsets[b : b + 1], sizes[b : b + 1], p.boxes, p.flip, crop_px=crop_px, dtype=torch.float64
        )
        for k in p.order[0, 0].long().tolist() if p.jitter.item() else []:
            want = reference.JITTER[k](want, p.factors[0, :, k].double())
        want = reference.grayscale(want, p.grayscale[0])
        want = reference.gaussian_blur(want, p.sigma[0].double(), p.blur[0])
        want = reference.solarize(want, p.solarize[0])
        want = reference.normalize(want.clamp(0, 1), out=torch.empty_like(want))
        assert (x[view, b] - want[0]).abs().max() < 10 * FLOAT64


@pytest.mark.parametrize("threads", [1, 2])
def test_a_view_is_bit_equal_in_any_batch_of_a_dataset_of_one_size(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        pixels, offsets, sizes = packed_images(np.tile([32, 32], (60, 1)))
        params = draw(np.arange(60), sizes.numpy(), seed=3)
        whole = views.apply(pixels, offsets, sizes, params, crop_px=32).view(2, 60, 3, 32, 32)
        for part in (torch.arange(59, -1, -1), torch.arange(1, 60, 4), torch.tensor([0]), torch.tensor([59, 30])):
            some = views.apply(pixels, offsets[part], sizes[part], ViewParams(params.packed[:, part]), crop_px=32)
            assert torch.equal(some.view(2, len(part), 3, 32, 32), whole[:, part])
    finally:
        torch.set_num_threads(before)


def test_a_view_does_not_depend_on_its_neighbours_sizes() -> None:
    pixels, offsets, sizes = packed_images(MIXED)
    params = draw(np.arange(7), MIXED, seed=3)
    whole = views.apply(pixels, offsets, sizes, params, crop_px=24).view(2, 7, 3, 24, 24)
    for b in range(7):
        one = slice(b, b + 1)
        alone = views.apply(pixels, offsets[one], sizes[one], ViewParams(params.packed[:, one]), crop_px=24)
        assert (alone.view(2, 3, 24, 24) - whole[:, b]).abs().max() < FLOAT32_PADDING


def test_views_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, offsets, sizes = packed_images(np.tile([20, 30], (11, 1)))
    params = draw(np.arange(11), sizes.numpy())
    whole = views.apply(pixels, offsets, sizes, params, crop_px=16)
    for pixels_a_chunk in (1, 2048, 4000):
        monkeypatch.setattr(reference, "CHUNK_PIXELS", pixels_a_chunk)
        assert torch.equal(views.apply(pixels, offsets, sizes, params, crop_px=16), whole)


def test_float32_views_agree_with_float64() -> None:
    pixels, offsets, sizes = packed_images(MIXED)
    params = draw(np.arange(7), MIXED)
    x32 = views.apply(pixels, offsets, sizes, params, crop_px=32)
    x64 = views.apply(pixels, offsets, sizes, params, crop_px=32, dtype=torch.float64)
    assert (x32.dtype, x64.dtype) == (torch.float32, torch.float64)
    assert (x32 - x64).abs().max() < FLOAT32_VIEW


def test_bfloat16_views_are_float32_views_rounded_once() -> None:
    pixels, offsets, sizes = packed_images(MIXED)
    params = draw(np.arange(7), MIXED)
    x32 = views.apply(pixels, offsets, sizes, params, crop_px=16)
    x16 = views.apply(pixels, offsets, sizes, params, crop_px=16, dtype=torch.bfloat16)
    assert torch.equal(x16, x32.bfloat16())


def test_views_are_channels_last_and_view_major() -> None:
    pixels, offsets, sizes = packed_images(MIXED)
    params = draw(np.arange(7), MIXED)
    x = views.apply(pixels, offsets, sizes, params, crop_px=8)
    assert x.shape == (14, 3, 8, 8)
    assert x.is_contiguous(memory_format=torch.channels_last)
    swapped = views.apply(pixels, offsets, sizes, ViewParams(params.packed.flip(0)), crop_px=8)
    assert torch.equal(swapped, torch.cat((x[7:], x[:7])))


def test_views_are_written_where_asked() -> None:
    pixels, offsets, sizes = packed_images(MIXED)
    params = draw(np.arange(7), MIXED)
    out = torch.full((14, 3, 8, 8), torch.nan).to(memory_format=torch.channels_last)
    assert views.apply(pixels, offsets, sizes, params, crop_px=8, out=out) is out
    assert torch.equal(out, views.apply(pixels, offsets, sizes, params, crop_px=8))


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(14, 3, 8, 8),
        torch.empty(14, 3, 9, 9, memory_format=torch.channels_last),
        torch.empty(14, 3, 8, 8, memory_format=torch.channels_last, dtype=torch.bfloat16),
    ],
    ids=["channels-first", "wrong-size", "wrong-dtype"],
)
def test_an_output_that_does_not_fit_is_refused(out: Tensor) -> None:
    with pytest.raises(ValueError, match=r"views need torch.float32 \[14, 3, 8, 8\] channels_last"):
        views.apply(*packed_images(MIXED), draw(np.arange(7), MIXED), crop_px=8, out=out)


def test_an_empty_batch_gives_no_views() -> None:
    nothing = np.zeros((0, 2), dtype=np.int64)
    params = draw(np.zeros(0, dtype=np.int64), nothing)
    x = views.apply(
        torch.zeros(0, dtype=torch.uint8), torch.zeros(0).long(), torch.from_numpy(nothing), params, crop_px=4
    )
    assert x.shape == (0, 3, 4, 4)


@pytest.mark.parametrize(("margin", "side"), [(1.0, 40), (224 / 256, 35), (0.001, 1)])
def test_center_view_is_the_centre_square(margin: float, side: int) -> None:
    pixels, offsets, sizes = packed_images(np.array([[40, 60], [70, 40]]))
    x = views.center_view(pixels, offsets, sizes, crop_px=12, margin=margin, dtype=torch.float64)
    boxes = torch.tensor([[[(h - side) // 2, (w - side) // 2, side, side] for h, w in sizes.tolist()]])
    no_flip = torch.zeros(1, 2, dtype=torch.bool)
    want = reference.random_resized_crop(pixels, offsets, sizes, boxes, no_flip, crop_px=12, dtype=torch.float64)
    assert torch.equal(x, reference.normalize(want, out=torch.empty_like(want)))
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_center_view_of_a_square_at_its_own_size_is_the_image() -> None:
    pixels, offsets, sizes = packed_images(np.array([[32, 32]]))
    x = views.center_view(pixels, offsets, sizes, crop_px=32, margin=1.0, dtype=torch.float64)
    image = pixels.view(1, 32, 32, 3).permute(0, 3, 1, 2).double() / 255
    assert (x - reference.normalize(image, out=torch.empty_like(image))).abs().max() < FLOAT64


@pytest.mark.parametrize("margin", [0.0, 1.01, -1.0])
def test_a_margin_outside_the_image_is_refused(margin: float) -> None:
    with pytest.raises(ValueError, match="margin"):
        views.center_view(*packed_images(np.array([[4, 4]])), crop_px=4, margin=margin)


def test_views_of_crops_are_those_of_the_images_they_were_cut_from() -> None:
    """Where a crop changes nothing: the whole image at its own size."""
    count, side = 5, 16
    pixels = torch.randint(0, 256, (count * side * side * 3,), dtype=torch.uint8, generator=torch.Generator())
    offsets, sizes = torch.arange(count) * side * side * 3, torch.full((count, 2), side)
    whole = ViewConfig(area=(1, 1), ratio=(1, 1), solarize=0.5)
    indices = np.arange(count)
    drawn = views.draw((whole, whole), seed=0, epochs=indices, indices=indices, sizes=sizes.numpy())
    wanted = views.apply(pixels, offsets, sizes, drawn, crop_px=side)
    begins = torch.arange(2 * count) * side * side * 3
    crops = views.params_of_crops(drawn, crop_px=side)
    got = views.apply(pixels.repeat(2), begins, sizes.repeat(2, 1), crops, crop_px=side)
    assert got.equal(wanted)
