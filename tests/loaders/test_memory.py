"""Laws of loader memory: nothing is decoded after the first pass, and what does not fit is refused with the numbers."""

from __future__ import annotations

import gc
import shutil
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbyol import loaders
from fastbyol.beton import JPEG, RAW, BetonError, Reader, StoredImage
from fastbyol.data_prep.writer import Writer
from fastbyol.errors import ConfigError
from fastbyol.loaders import memory
from fastbyol.loaders.batch import pack
from fastbyol.loaders.native import decode
from fastbyol.order import Rows, stream
from fastbyol.system.limits import available_bytes
from tests.conftest import Betons


def test_batches_do_not_need_the_file_any_more(betons: Betons, tmp_path: Path) -> None:
    copy = tmp_path / "copy.beton"
    shutil.copy(betons.train, copy)
    with Reader(betons.train) as whole, Reader(copy) as reader:
        rows = list(islice(stream(0, batch_size=48, count=160, seed=0), 9))
        with closing(loaders.load("memory", reader, rows, workers=2)) as batches:
            seen = {index for batch in islice(batches, 4) for index in batch.indices.tolist()}
            assert seen == set(range(160))
            first = int(reader.offsets.min())
            with copy.open("r+b") as file:
                file.seek(first)
                file.write(bytes(copy.stat().st_size - first))
            assert not any(reader.payload(0))
            for batch, each in zip(batches, rows[4:], strict=True):
                wanted = decode(whole, each)
                for got, begin in zip(batch.offsets.tolist(), wanted.offsets.tolist(), strict=True):
                    assert batch.pixels[got : got + 3072].equal(wanted.pixels[begin : begin + 3072])


def test_batches_share_the_resident_pixels(betons: Betons) -> None:
    with Reader(betons.train) as reader:
        rows = stream(0, batch_size=48, count=160, seed=0)
        with closing(loaders.load("memory", reader, rows, workers=2)) as batches:
            assert len({batch.pixels.data_ptr() for batch in islice(batches, 3)}) == 1


def test_what_one_load_has_decoded_serves_the_next(betons: Betons, tmp_path: Path) -> None:
    """Calibration, training and recalibration load one after the other."""
    copy = tmp_path / "copy.beton"
    shutil.copy(betons.train, copy)
    with Reader(betons.train) as whole, Reader(copy) as reader:
        rows = list(islice(stream(0, batch_size=40, count=160, seed=0), 4))
        with closing(loaders.load("memory", reader, rows, workers=2)) as batches:
            address = {batch.pixels.data_ptr() for batch in batches}
        first = int(reader.offsets.min())
        with copy.open("r+b") as file:
            file.seek(first)
            file.write(bytes(copy.stat().st_size - first))
        with closing(loaders.load("memory", reader, rows, workers=2)) as batches:
            check_pixels(whole, list(batches), rows)
        with closing(loaders.load("memory", reader, rows, workers=2)) as batches:
            assert {batch.pixels.data_ptr() for batch in batches} == address


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_a_load_that_was_closed_leaves_no_hole(betons: Betons, taken: int) -> None:
    """What it had asked for in advance was never kept."""
    with Reader(betons.train) as reader:
        rows = list(islice(stream(0, batch_size=40, count=160, seed=0), 4))
        with closing(loaders.load("memory", reader, rows, workers=2, prefetch=3)) as batches:
            assert len(list(islice(batches, taken))) == taken
        with closing(loaders.load("memory", reader, rows[::-1], workers=2)) as batches:
            check_pixels(reader, list(batches), rows[::-1])


def check_pixels(whole: Reader, got: list[loaders.Batch], rows: list[Rows]) -> None:
    for batch, each in zip(got, rows, strict=True):
        wanted = decode(whole, each)
        for at, begin in zip(batch.offsets.tolist(), wanted.offsets.tolist(), strict=True):
            assert batch.pixels[at : at + 3072].equal(wanted.pixels[begin : begin + 3072])


def test_a_stand_in_is_not_served_to_who_wants_an_error(tmp_path: Path) -> None:
    with Writer(tmp_path / "bad.beton", capacity=2, class_names=None) as writer:
        writer.append(StoredImage(JPEG, 8, 8, bytes(100)))
        writer.append(StoredImage(RAW, 8, 8, bytes(192)))
    rows = [Rows(np.arange(2), np.zeros(2, np.int64))]
    with Reader(tmp_path / "bad.beton") as reader:
        for _ in range(2):
            (batch,) = loaders.load("memory", reader, rows, workers=1, on_error="skip")
            assert (batch.indices.tolist(), batch.skipped.tolist()) == ([1, 1], [0])
        with pytest.raises(BetonError, match="sample 0"):
            list(loaders.load("memory", reader, rows, workers=1, on_error="fail"))


def test_the_pixels_go_with_their_reader(betons: Betons) -> None:
    gc.collect()
    before = len(memory.DECODED_FILES)
    with Reader(betons.train) as reader:
        rows = list(islice(stream(0, batch_size=48, count=160, seed=0), 1))
        list(loaders.load("memory", reader, rows, workers=1))
        assert len(memory.DECODED_FILES) == before + 1
    del reader
    gc.collect()
    assert len(memory.DECODED_FILES) == before


def test_a_file_too_large_for_the_memory_is_refused_with_the_numbers(tmp_path: Path) -> None:
    path, side = tmp_path / "huge.beton", 65_535
    count = int(available_bytes() // (3 * side * side)) + 2
    with Writer(path, capacity=count, class_names=None) as writer:
        for _ in range(count):
            writer.append(StoredImage(JPEG, side, side, b"a record that claims a huge image"))
    gib = 3 * side * side * count / 2**30
    with Reader(path) as reader:
        message = rf"takes {gib:.1f} GiB, and decoding it up to .* GiB of RAM that are available"
        with pytest.raises(ConfigError, match=message):
            loaders.load("memory", reader, [], workers=1)


def test_room_is_wanted_for_every_process_and_for_what_is_being_decoded(betons: Betons, tmp_path: Path) -> None:
    with Reader(betons.train) as reader:
        rows = list(islice(stream(0, batch_size=48, count=160, seed=0), 1))
        many = 2 * int(available_bytes() // (160 * 32 * 32 * 3))  # twice: what is available changes meanwhile
        with pytest.raises(ConfigError, match=f"in each of {many} processes"):
            loaders.load("memory", reader, rows, workers=1, processes=many)
    path, side = tmp_path / "half.beton", 65_535
    count = max(int(0.6 * available_bytes() // (3 * side * side)), 1)
    with Writer(path, capacity=count, class_names=None) as writer:
        for _ in range(count):
            writer.append(StoredImage(JPEG, side, side, b"a record that claims a huge image"))
    everything = Rows(np.arange(count), np.zeros(count, np.int64))
    with Reader(path) as reader, pytest.raises(ConfigError, match="give --loader native"):
        loaders.load("memory", reader, [everything], workers=1)  # decoded, the file fits; twice, it does not


def test_a_batch_comes_before_the_rest_is_decoded(betons: Betons) -> None:
    """There is no start-up: what a signal or a budget would have to wait for is one batch."""
    with Reader(betons.train) as reader:
        rows = islice(stream(0, batch_size=8, count=160, seed=0), 20)
        with closing(loaders.load("memory", reader, rows, workers=2, prefetch=1)) as batches:
            assert len(next(batches).indices) == 8
            reader.close()  # were all decoded, nothing would be missed
            with pytest.raises(ValueError, match="released memoryview"):
                list(batches)


@pytest.mark.parametrize("equal", [True, False])
def test_gathering_copies_the_images_asked_for(tmp_path: Path, equal: bool) -> None:
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (4, 5 if equal else 3 + i, 3), np.uint8) for i in range(6)]
    with Writer(tmp_path / "raw.beton", capacity=6, class_names=None) as writer:
        for image in images:
            writer.append(StoredImage(RAW, image.shape[1], 4, image.tobytes()))
    with Reader(tmp_path / "raw.beton") as reader:
        everything = np.arange(6)
        whole = pack(reader, Rows(everything, np.zeros(6, np.int64)))
        pixels = torch.from_numpy(np.concatenate([image.ravel() for image in images]))
        part = pack(reader, Rows(np.array([4, 0, 4, 5]), np.zeros(4, np.int64)))
        out = part.empty()
        (memory._gather_equal if equal else memory._gather)(pixels, whole, part, out)
    wanted = b"".join(images[index].tobytes() for index in (4, 0, 4, 5))
    assert out.numpy()[: len(wanted)].tobytes() == wanted


def test_available_memory_is_less_than_the_machine_has() -> None:
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    assert 0 < available_bytes() < int(lines["MemTotal"].split()[0]) * 1024
