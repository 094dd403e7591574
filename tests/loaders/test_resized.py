"""Laws of images kept at a chosen side: what becomes of their size and pixels, and the contract of loaders."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fastbyol import loaders, views
from fastbyol.beton import RAW, BetonError, Reader, StoredImage
from fastbyol.config import ViewConfig
from fastbyol.data_prep.writer import Writer
from fastbyol.errors import ConfigError
from fastbyol.loaders import memory, native
from fastbyol.loaders.batch import Batch
from fastbyol.loaders.resized import ResizedReader, at_side, resize
from fastbyol.order import Rows, stream
from tests.loaders.test_contract import (
    COUNT,
    STAND_INS,
    asked,
    check_that_closing_leaves_nothing,
    expected,
    images,
    stored,
    write,
)
from tests.support.tolerances import RESIZED_LEVELS

SIDE = 24  # pixels; most images of the suite have longer short sides, some do not


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write images of many sizes, JPEG and raw."""
    return write(tmp_path_factory.mktemp("mixed") / "mixed.beton", {})


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the same with bad samples, of which STAND_INS tells the replacements."""
    bad = {i: replace(stored(i), mode=0, data=bytes(len(stored(i).data))) for i in STAND_INS}
    return write(tmp_path_factory.mktemp("damaged") / "damaged.beton", bad)


@pytest.fixture(params=loaders.RESIZING)
def name(request: pytest.FixtureRequest) -> str:
    """Name a loader that resizes."""
    loader: str = request.param
    return loader


def cubic_weights(length: int, wanted: int) -> NDArray[np.float64]:
    """Return the weights [wanted, length] of a shrunk axis: Keys' cubic, a = -1/2, as wide as a pixel of the result."""
    scale = length / wanted
    centres = (np.arange(wanted)[:, None] + 0.5) * scale
    x = np.abs((np.arange(length) + 0.5 - centres) / scale)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


def by_matrices(index: int) -> NDArray[np.float64]:
    """Resize a sample by its definition in float64: across, rounded to levels, then down."""
    image = expected("native", index)
    height, width, _ = image.shape
    scale = SIDE / min(height, width)
    if scale >= 1:
        return image.astype(np.float64)
    size = max(round(height * scale), 1), max(round(width * scale), 1)
    across = np.einsum("ow,hwc->hoc", cubic_weights(width, size[1]), image).round().clip(0, 255)
    return np.einsum("oh,hwc->owc", cubic_weights(height, size[0]), across).clip(0, 255)


def loaded(name: str, reader: Reader, rows: list[Rows], **settings: str) -> list[Batch]:
    """Load batches and copy their pixels, which loader memory shares between them."""
    with closing(loaders.load(name, reader, rows, workers=2, **settings)) as batches:
        return [replace(batch, pixels=batch.pixels.clone()) for batch in batches]


def equal(first: Batch, second: Batch) -> bool:
    """Tell whether two batches hold the same samples with the same pixels."""
    if not np.array_equal(first.indices, second.indices) or not np.array_equal(first.epochs, second.epochs):
        return False
    return all(np.array_equal(a, b) for a, b in zip(images(first), images(second), strict=True))


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(8, 600))
def test_the_short_side_is_the_one_asked_for_and_the_shape_stays(height: int, width: int, side: int) -> None:
    whole = Reader.__new__(Reader)
    whole.heights, whole.widths = np.array([height]), np.array([width])
    reader = ResizedReader(whole, side)
    (h,), (w,) = reader.heights.tolist(), reader.widths.tolist()
    if min(height, width) <= side:
        assert (h, w) == (height, width)
        return
    assert min(h, w) == side
    assert max(h, w) == pytest.approx(max(height, width) * side / min(height, width), abs=0.5 + 1e-9)
    assert (h >= w) == (height >= width) or h == w


def test_images_are_those_of_the_file_resized(name: str, mixed: Path) -> None:
    with Reader(mixed) as reader:
        small = sum(min(expected("native", index).shape[:2]) <= SIDE for index in range(COUNT))
        assert 3 < small < COUNT - 3
        for batch in loaded(name, at_side(reader, SIDE), asked(0, 2)):
            for image, index in zip(images(batch), batch.indices.tolist(), strict=True):
                wanted = by_matrices(index)
                assert image.shape == wanted.shape
                assert np.abs(image - wanted).max() <= RESIZED_LEVELS, f"sample {index}"
            assert batch.labels is not None
            assert batch.labels.tolist() == [index % 2 for index in batch.indices]


def test_a_resized_image_has_the_same_bits_on_any_number_of_threads() -> None:
    image = np.random.default_rng(0).integers(0, 256, (301, 407, 3), np.uint8)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            results.append(np.empty((100, 135, 3), np.uint8))
            resize(image, results[-1])
        finally:
            torch.set_num_threads(before)
    assert all(np.array_equal(results[0], other) for other in results)


def test_no_side_is_the_file_itself(mixed: Path) -> None:
    with Reader(mixed) as reader:
        assert at_side(reader, None) is reader
        batches = [loaded("native", each, asked(0, 2)) for each in (reader, at_side(reader, 90))]
        assert all(equal(*pair) for pair in zip(*batches, strict=True))


@pytest.mark.parametrize("k", [0, 1, 7, 40])
def test_batches_are_the_same_from_any_start_and_whether_the_memory_is_filled(mixed: Path, k: int) -> None:
    """Loader native decodes and resizes each time anew."""
    with Reader(mixed) as file:
        reader = at_side(file, SIDE)
        rows = list(islice(stream(k, batch_size=7, count=COUNT, seed=0), 14))
        wanted = loaded("native", reader, rows)
        first, second = (loaded("memory", reader, rows) for _ in range(2))
        afresh = loaded("memory", at_side(file, SIDE), rows[3:])
        for batch, filling, filled in zip(wanted, first, second, strict=True):
            assert equal(batch, filling)
            assert equal(batch, filled)
        assert all(equal(*pair) for pair in zip(wanted[3:], afresh, strict=True))


def test_boxes_lie_where_they_would_in_the_file_to_a_pixel(mixed: Path) -> None:
    rows, plain = asked(0, 1)[0], (ViewConfig(), ViewConfig(blur=0.1, solarize=0.2))
    with Reader(mixed) as file:
        drawn = []
        for reader in (file, at_side(file, SIDE)):
            sizes = np.stack([reader.heights, reader.widths], 1)[rows.indices]
            packed = views.draw(plain, seed=1, epochs=rows.epochs, indices=rows.indices, sizes=sizes).packed
            drawn.append((packed, torch.from_numpy(np.concatenate([sizes, sizes], 1))))
    (whole, whole_sizes), (small, small_sizes) = drawn
    assert whole[..., 4:].equal(small[..., 4:])  # flips, colours, blur
    apart = (whole[..., :4] / whole_sizes - small[..., :4] / small_sizes).abs()
    # a box's sides are rounded, and its place is drawn among the places that the rounded box has
    assert (apart <= 1.5 / small_sizes + 1.5 / whole_sizes).all()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_bad_sample_is_named_or_replaced_as_at_full_size(name: str, damaged: Path, ranks: int) -> None:
    with Reader(damaged) as file:
        reader = at_side(file, SIDE)
        for index in STAND_INS:
            with pytest.raises(BetonError, match=f"sample {index} .*write the file anew"):
                loaded(name, reader, [Rows(np.array([0, index]), np.zeros(2, np.int64))])
        for rank in range(ranks):
            rows = asked(0, 4, rank=rank, ranks=ranks)
            for batch, each in zip(loaded(name, reader, rows, on_error="skip"), rows, strict=True):
                wanted = [STAND_INS.get(index, index) for index in each.indices.tolist()]
                assert batch.indices.tolist() == wanted
                assert sorted(batch.skipped) == sorted(i for i in each.indices.tolist() if i in STAND_INS)
                for image, index in zip(images(batch), wanted, strict=True):
                    assert image.shape == by_matrices(index).shape


def test_closing_leaves_neither_threads_nor_mappings(name: str, mixed: Path) -> None:
    check_that_closing_leaves_nothing(name, mixed, side=SIDE)


def test_a_resized_reader_leaves_its_file_open(mixed: Path) -> None:
    with Reader(mixed) as file:
        with at_side(file, SIDE) as reader:
            assert len(reader) == COUNT
        assert bytes(file.payload(0))


@pytest.mark.parametrize("name", ["ffcv", "dali", "nvjpeg", "package.module:load"])
def test_loaders_that_decode_by_themselves_refuse(name: str, mixed: Path) -> None:
    with Reader(mixed) as reader, pytest.raises(ConfigError, match="give loader native or memory"):
        loaders.load(name, at_side(reader, SIDE), asked(0, 1), workers=1)


def test_large_images_are_decoded_by_all_threads_however_small_they_are_kept(tmp_path: Path) -> None:
    with Writer(tmp_path / "large.beton", capacity=1, class_names=None) as writer:
        writer.append(StoredImage(RAW, 400, 300, bytes(360_000)))
    with Reader(tmp_path / "large.beton") as reader:
        assert native.decoding_threads(at_side(reader, 16), workers=5) == 5


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9, 1.0])
def test_the_side_that_is_proposed_is_the_longest_that_fits(mixed: Path, share: float) -> None:
    def size(reader: Reader) -> int:
        return int((reader.heights * reader.widths).sum())

    with Reader(mixed) as reader:
        limit = share * size(reader)
        side = memory.side_that_fits(reader, lambda each: size(each) <= limit)
        longest = int(np.minimum(reader.heights, reader.widths).max())
        if share == 1.0:
            assert side == longest
        elif size(ResizedReader(reader, memory.SIDE_MIN)) > limit:
            assert side is None
        else:
            assert side is not None
            assert size(ResizedReader(reader, side)) <= limit < size(ResizedReader(reader, side + 1))


def test_a_gpu_that_is_too_small_is_told_with_the_side_that_fits(mixed: Path) -> None:
    with Reader(mixed) as reader:
        wanted = 2 * int((3 * ResizedReader(reader, 40).heights * ResizedReader(reader, 40).widths).sum()) + 1000
        side = int(memory.gpu_advice(reader, free=wanted).split("--memory-side ")[1].split()[0])
        assert 35 <= side <= 45
        assert memory.gpu_advice(reader, free=1000) == ""
        assert memory.gpu_advice(at_side(reader, 60), free=wanted) == memory.gpu_advice(reader, free=wanted)


def test_too_little_memory_is_refused_with_the_side_that_fits(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Reader(mixed) as file:
        sides = []
        for reader in (file, at_side(file, 80)):
            monkeypatch.setattr(memory, "available_bytes", lambda: 500_000)
            with pytest.raises(ConfigError, match="give --loader native, or --memory-side") as refused:
                loaders.load("memory", reader, asked(0, 1), workers=1)
            sides.append(int(str(refused.value).split("--memory-side ")[1].split(",")[0]))
        assert sides[0] == sides[1]
        assert len(loaded("memory", at_side(file, sides[0]), asked(0, 1))) == 1
        with pytest.raises(ConfigError):
            loaders.load("memory", at_side(file, sides[0] + 1), asked(0, 1), workers=1)
