"""Laws that every loader keeps: the order asked for, whole samples, errors that arrive, and nothing left behind."""

from __future__ import annotations

import gc
import importlib.util
import shutil
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from numpy.typing import NDArray

from fastbyol import loaders, views
from fastbyol.beton import JPEG, RAW, BetonError, Reader, StoredImage
from fastbyol.config import ViewConfig
from fastbyol.data_prep.writer import Writer
from fastbyol.loaders.batch import Batch
from fastbyol.loaders.resized import at_side
from fastbyol.order import Rows, stream

COUNT = 41  # a prime: no batch size divides it
BATCH = 24
PEERS = {"ffcv": "ffcv", "dali": "nvidia"}


@pytest.fixture(
    params=["native", "memory", *(pytest.param(name, marks=pytest.mark.peers) for name in PEERS)],
)
def name(request: pytest.FixtureRequest) -> str:
    """Name a loader; skip one whose package is missing."""
    loader: str = request.param
    if loader in PEERS and importlib.util.find_spec(PEERS[loader]) is None:
        pytest.skip(f"{loader} is not installed; make test-peers installs it")
    return loader


def picture(index: int) -> NDArray[np.uint8]:
    """Draw an image of its own size, 5 to 90 pixels a side, smooth enough for JPEG."""
    random = np.random.default_rng(index)
    height, width = random.integers(5, 90, 2)
    coarse = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return np.ascontiguousarray(coarse.repeat(8, 0).repeat(8, 1)[:height, :width])


def stored(index: int) -> StoredImage:
    """Store every fourth image raw, the others as JPEGs of all subsamplings."""
    image = picture(index)
    height, width, _ = image.shape
    if index % 4 == 3:
        return StoredImage(RAW, width, height, image.tobytes())
    subsampling = ("420", "444", "422")[index % 3]
    return StoredImage(JPEG, width, height, simplejpeg.encode_jpeg(image, quality=90, colorsubsampling=subsampling))


def write(path: Path, images: dict[int, StoredImage]) -> Path:
    """Write the images of the suite, some of them replaced."""
    with Writer(path, capacity=COUNT, class_names=["even", "odd"]) as writer:
        for index in range(COUNT):
            writer.append(images.get(index, stored(index)), label=index % 2)
    return path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write images of many sizes, JPEG and raw."""
    return write(tmp_path_factory.mktemp("mixed") / "mixed.beton", {})


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the same with samples 5 and 6, and the last, as bytes that are no JPEG, and 9 of another size."""
    path = tmp_path_factory.mktemp("damaged") / "damaged.beton"
    good = {index: stored(index) for index in (5, 6, 9, COUNT - 1)}
    bad = {i: StoredImage(JPEG, s.width, s.height, bytes(len(s.data))) for i, s in good.items()}
    bad[9] = StoredImage(JPEG, good[9].width, good[9].height, simplejpeg.encode_jpeg(picture(9)[:-3, :-1].copy()))
    return write(path, bad)


STAND_INS = {5: 7, 6: 7, 9: 10, COUNT - 1: 0}


def asked(start: int, count: int, **settings: int) -> list[Rows]:
    """Ask for global batches of the suite."""
    return list(islice(stream(start, **({"batch_size": BATCH, "count": COUNT, "seed": 3} | settings)), count))


def images(batch: Batch) -> list[NDArray[np.uint8]]:
    """Take the images of a batch apart."""
    found = []
    for offset, (height, width) in zip(batch.offsets.tolist(), batch.sizes.tolist(), strict=True):
        found.append(batch.pixels.numpy()[offset : offset + height * width * 3].reshape(height, width, 3).copy())
    return found


def expected(name: str, index: int) -> NDArray[np.uint8]:
    """Decode a sample as the loader's decoder should: ffcv asks for the fast DCT."""
    image = stored(index)
    if image.mode == RAW:
        return picture(index)
    decoded: NDArray[np.uint8] = simplejpeg.decode_jpeg(image.data, "RGB", fastdct=name == "ffcv")
    return decoded


def test_batches_hold_the_samples_asked_for_with_the_pixels_of_the_decoder(name: str, mixed: Path) -> None:
    rows = [*asked(2, 5), Rows(np.array([3]), np.array([9])), Rows(np.array([8, 8, 3, 0]), np.array([0, 1, 2, 3]))]
    with Reader(mixed) as reader, closing(loaders.load(name, reader, rows, workers=3)) as batches:
        got = list(batches)
    assert len(got) == len(rows)
    for batch, each in zip(got, rows, strict=True):
        assert batch.indices.tolist() == each.indices.tolist()
        assert batch.epochs.tolist() == each.epochs.tolist()
        assert batch.labels is not None
        assert batch.labels.tolist() == [index % 2 for index in each.indices]
        assert not len(batch.skipped)
        for image, index in zip(images(batch), each.indices.tolist(), strict=True):
            assert np.array_equal(image, expected(name, index)), f"sample {index}"


def test_draws_are_those_of_every_other_loader(name: str, mixed: Path) -> None:
    rows, view = asked(0, 1)[0], (ViewConfig(), ViewConfig())
    with Reader(mixed) as reader:
        sizes = np.stack([reader.heights, reader.widths], 1)[rows.indices]
        wanted = views.draw(view, seed=1, epochs=rows.epochs, indices=rows.indices, sizes=sizes)
        with closing(loaders.load(name, reader, [rows], workers=1)) as batches:
            b = next(batches)
    assert views.draw(view, seed=1, epochs=b.epochs, indices=b.indices, sizes=b.sizes.numpy()).packed.equal(
        wanted.packed
    )


def test_every_sample_comes_once_an_epoch(name: str, mixed: Path) -> None:
    with Reader(mixed) as reader, closing(loaders.load(name, reader, asked(0, 4), workers=2)) as batches:
        got = list(batches)
    epochs, indices = (np.concatenate(column) for column in ([b.epochs for b in got], [b.indices for b in got]))
    seen = sorted(zip(epochs.tolist(), indices.tolist(), strict=True))
    whole = [(epoch, index) for epoch, index in seen if epoch < 2]
    assert whole == [(epoch, index) for epoch in range(2) for index in range(COUNT)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_share_the_global_batches(name: str, mixed: Path, ranks: int) -> None:
    with Reader(mixed) as reader:
        parts = []
        for rank in range(ranks):
            with closing(loaders.load(name, reader, asked(1, 3, rank=rank, ranks=ranks), workers=2)) as batches:
                parts.append([list(zip(b.epochs, b.indices, images(b), strict=True)) for b in batches])
    for k, each in enumerate(asked(1, 3)):
        joined = [sample for part in parts for sample in part[k]]
        assert [index for _, index, _ in joined] == each.indices.tolist()
        assert [epoch for epoch, _, _ in joined] == each.epochs.tolist()
        assert all(np.array_equal(image, expected(name, index)) for _, index, image in joined)


@pytest.mark.parametrize("k", [0, 1, 7, 1000])
def test_resuming_at_any_batch_reads_on_and_not_what_came_before(name: str, mixed: Path, k: int) -> None:
    with Reader(mixed) as reader:
        with closing(loaders.load(name, reader, stream(k, batch_size=7, count=COUNT, seed=0), workers=2)) as batches:
            late = next(batches)
        if k < 10:
            with closing(loaders.load(name, reader, asked(0, k + 1, batch_size=7, seed=0), workers=2)) as batches:
                *_, walked = batches
            assert walked.indices.tolist() == late.indices.tolist()
            assert all(np.array_equal(a, b) for a, b in zip(images(walked), images(late), strict=True))
    assert late.epochs.tolist() == [position // COUNT for position in range(7 * k, 7 * (k + 1))]


def test_a_corrupt_sample_is_named(name: str, damaged: Path) -> None:
    for index in STAND_INS:
        rows = Rows(np.array([0, 1, index, 2]), np.zeros(4, np.int64))
        with Reader(damaged) as reader, pytest.raises(BetonError, match=f"sample {index} .*write the file anew"):
            list(loaders.load(name, reader, [rows], workers=2))


def test_a_corrupt_sample_is_replaced_by_the_next_good_one_and_counted(name: str, damaged: Path) -> None:
    rows = asked(0, 5)
    with (
        Reader(damaged) as reader,
        closing(loaders.load(name, reader, rows, workers=2, on_error="skip")) as batches,
    ):
        got = list(batches)
    assert len(got) == len(rows)
    for batch, each in zip(got, rows, strict=True):
        wanted = [STAND_INS.get(index, index) for index in each.indices.tolist()]
        assert batch.indices.tolist() == wanted
        assert batch.epochs.tolist() == each.epochs.tolist()
        assert sorted(batch.skipped) == sorted(index for index in each.indices.tolist() if index in STAND_INS)
        assert batch.labels is not None
        assert batch.labels.tolist() == [index % 2 for index in wanted]
        for image, index in zip(images(batch), wanted, strict=True):
            accurate = np.array_equal(image, expected("native", index))  # a stand-in is decoded by simplejpeg
            assert accurate or np.array_equal(image, expected(name, index)), f"sample {index}"


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("k", [0, 3])
def test_stand_ins_are_those_of_one_rank_that_was_never_interrupted(
    name: str, damaged: Path, ranks: int, k: int
) -> None:
    """Whatever ranks share the batches, and wherever they were resumed."""

    def skipping(rank: int, ranks: int, start: int) -> list[Batch]:
        rows = asked(start, 6 - start, rank=rank, ranks=ranks)
        with closing(loaders.load(name, reader, rows, workers=2, on_error="skip")) as batches:
            return [replace(batch, pixels=batch.pixels.clone()) for batch in batches]

    with Reader(damaged) as reader:
        parts = [skipping(rank, ranks, k) for rank in range(ranks)]
        for step, whole in enumerate(skipping(0, 1, 0)[k:]):
            joined = [part[step] for part in parts]
            for field in ("indices", "epochs", "labels"):
                both = np.concatenate([getattr(batch, field) for batch in joined]), getattr(whole, field)
                assert np.array_equal(*both), field
            assert sorted(np.concatenate([batch.skipped for batch in joined])) == sorted(whole.skipped)
            shown = [image for batch in joined for image in images(batch)]
            if name != "ffcv":  # what replaces a sample when it is found bad is decoded by simplejpeg, later by ffcv
                assert all(np.array_equal(a, b) for a, b in zip(shown, images(whole), strict=True))


def test_a_sample_known_to_be_bad_is_not_asked_for_again(name: str, damaged: Path, tmp_path: Path) -> None:
    """The file is repaired after two epochs: whoever asked again would now get the sample."""
    copy = tmp_path / "copy.beton"
    shutil.copy(damaged, copy)
    repaired = [index for index in STAND_INS if index != 9]  # another size
    under_way = 200  # batches, at most: ffcv runs over a thousand images ahead
    with Reader(copy) as reader:
        rows = stream(0, batch_size=7, count=COUNT, seed=0)
        with closing(loaders.load(name, reader, rows, workers=2, on_error="skip")) as batches:
            seen = {int(index) for batch in islice(batches, 2 * COUNT // 7) for index in batch.skipped}
            assert seen == set(STAND_INS)
            with copy.open("r+b") as file:
                for index in repaired:
                    file.seek(int(reader.offsets[index]))
                    file.write(stored(index).data)
            later = list(islice(batches, under_way, under_way + 2 * COUNT // 7))
    assert not {int(index) for batch in later for index in batch.indices} & STAND_INS.keys()
    assert {int(index) for batch in later for index in batch.skipped} == set(STAND_INS)


def test_a_file_without_a_good_sample_ends(name: str, tmp_path: Path) -> None:
    with Writer(tmp_path / "bad.beton", capacity=3, class_names=None) as writer:
        for _ in range(3):
            writer.append(StoredImage(JPEG, 8, 8, bytes(100)))
    rows = Rows(np.arange(3), np.zeros(3, np.int64))
    with Reader(tmp_path / "bad.beton") as reader, pytest.raises(BetonError, match="no sample decodes"):
        list(loaders.load(name, reader, [rows], workers=2, on_error="skip"))


def test_an_error_in_the_order_arrives_and_does_not_hang(name: str, mixed: Path) -> None:
    def broken() -> Iterator[Rows]:
        yield from asked(0, 4)
        raise ZeroDivisionError("the order broke")

    with Reader(mixed) as reader, pytest.raises(ZeroDivisionError, match="the order broke"):
        list(loaders.load(name, reader, broken(), workers=2))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # ffcv's, as it should be
def test_a_thread_that_dies_is_an_error_and_no_hang(name: str, mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Reader(mixed) as reader:
        rows = stream(0, batch_size=5, count=COUNT, seed=0)
        with closing(loaders.load(name, reader, rows, workers=2)) as batches:
            next(batches)
            if name == "ffcv":  # which reads through a mapping of its own
                theirs = importlib.import_module("ffcv.loader.epoch_iterator").EpochIterator
                monkeypatch.setattr(theirs, "run_pipeline", lambda *_: 1 // 0)
            else:
                reader.close()
            with pytest.raises((ValueError, RuntimeError), match=r"released memoryview|ffcv's thread died: ZeroDiv"):
                deque(islice(batches, 2000), maxlen=0)  # ffcv runs over a thousand images ahead


def test_decoding_threads_are_those_asked_for_unless_fixed(name: str, mixed: Path) -> None:
    with Reader(mixed) as reader:
        assert loaders.decoding_threads(name, reader, workers=1) in (1, None)


def tasks() -> int:
    """Count the threads of this process, those of libraries included."""
    return len(list(Path("/proc/self/task").iterdir()))


def mappings(path: Path) -> int:
    """Count the places where a file is mapped."""
    return sum(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines())


def check_that_closing_leaves_nothing(name: str, path: Path, *, side: int | None = None) -> None:
    """Assert that closed loads, of images resized to `side`, leave neither threads nor the file mapped."""

    def use(*, take: int) -> None:
        with Reader(path) as reader:
            rows = stream(0, batch_size=5, count=COUNT, seed=0)
            with closing(loaders.load(name, at_side(reader, side), rows, workers=3)) as batches:
                assert len(list(islice(batches, take))) == take

    use(take=20)  # libraries start pools of their own, once
    before, python = tasks(), threading.active_count()
    for take in (0, 1, 20):
        use(take=take)
        gc.collect()
        assert mappings(path) == 0
    assert threading.active_count() == python
    assert tasks() <= before


def test_closing_leaves_neither_threads_nor_mappings(name: str, mixed: Path) -> None:
    check_that_closing_leaves_nothing(name, mixed)


def test_torch_keeps_its_threads(name: str, mixed: Path) -> None:
    before = torch.get_num_threads()
    with Reader(mixed) as reader, closing(loaders.load(name, reader, asked(0, 3), workers=1)) as batches:
        for _ in batches:
            assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before


def anonymous_bytes() -> int:
    """Measure the memory of this process that no file backs."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_fifty_epochs_do_not_grow(name: str, mixed: Path, damaged: Path, on_error: str) -> None:
    epochs_of_50 = 50 * COUNT // BATCH
    with Reader(damaged if on_error == "skip" else mixed) as reader:
        rows = stream(0, batch_size=BATCH, count=COUNT, seed=0)
        with closing(loaders.load(name, reader, rows, workers=2, on_error=on_error)) as batches:
            skipped = sum(len(batch.skipped) for batch in islice(batches, epochs_of_50))  # libraries take their memory
            before, decoded_bytes = anonymous_bytes(), 0
            for batch in islice(batches, epochs_of_50):
                decoded_bytes += int(3 * batch.sizes.prod(1).sum())
                skipped += len(batch.skipped)
            assert anonymous_bytes() - before < decoded_bytes / 4
    wanted = np.concatenate([each.indices for each in asked(0, 2 * epochs_of_50, seed=0)])
    assert skipped == (np.isin(wanted, list(STAND_INS)).sum() if on_error == "skip" else 0)
