"""Laws of the native loader: the order asked for, pixels of the decoder, errors that arrive, threads that end."""

from __future__ import annotations

import shutil
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg

from fastbyol.beton import JPEG, RAW, BetonError, Reader, StoredImage
from fastbyol.data_prep.writer import Writer
from fastbyol.loaders.batch import max_batch_bytes, pack
from fastbyol.loaders.native import decode, load, max_load_bytes
from fastbyol.order import Rows, stream
from tests.conftest import Betons


def rows(*indices: int) -> Rows:
    return Rows(np.array(indices, np.int64), np.zeros(len(indices), np.int64))


def test_a_batch_holds_the_images_asked_for(betons: Betons) -> None:
    with Reader(betons.train) as reader:
        batch = decode(reader, rows(5, 0, 5, 159))
        assert batch.labels is not None
        assert reader.labels is not None
        assert batch.labels.tolist() == reader.labels[[5, 0, 5, 159]].tolist()
        for place, index in enumerate((5, 0, 5, 159)):
            begin, (height, width) = int(batch.offsets[place]), batch.sizes[place].tolist()
            image = batch.pixels[begin : begin + height * width * 3].reshape(height, width, 3)
            assert np.array_equal(image.numpy(), simplejpeg.decode_jpeg(bytes(reader.payload(index)), "RGB"))


def test_raw_images_of_mixed_sizes_come_back_exactly(tmp_path: Path) -> None:
    images = [
        np.random.default_rng(i).integers(0, 256, size, np.uint8)
        for i, size in enumerate([(1, 1, 3), (7, 3, 3), (2, 9, 3)])
    ]
    with Writer(tmp_path / "raw.beton", capacity=3, class_names=None) as writer:
        for image in images:
            writer.append(StoredImage(RAW, image.shape[1], image.shape[0], image.tobytes()))
    with Reader(tmp_path / "raw.beton") as reader:
        batch = decode(reader, rows(2, 0, 1))
    assert batch.labels is None
    spare = 3 * (9 - 3)  # so that a row as wide as the widest image can be read at the last one
    assert batch.pixels.numpy().tobytes() == b"".join(images[i].tobytes() for i in (2, 0, 1)) + bytes(spare)
    assert batch.sizes.tolist() == [[2, 9], [1, 1], [7, 3]]
    assert batch.offsets.tolist() == [0, 54, 57]


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_come_in_order_whatever_the_threads(betons: Betons, workers: int) -> None:
    with Reader(betons.train) as reader:
        asked = list(islice(stream(3, batch_size=24, count=len(reader), seed=1), 9))
        got = list(load(reader, asked, workers=workers))
        assert [batch.indices.tolist() for batch in got] == [r.indices.tolist() for r in asked]
        assert [batch.epochs.tolist() for batch in got] == [r.epochs.tolist() for r in asked]
        assert all(batch.pixels.equal(decode(reader, r).pixels) for batch, r in zip(got, asked, strict=True))


def test_closing_early_ends_the_threads_and_reads_no_further(betons: Betons) -> None:
    taken = []

    def endless() -> Iterator[Rows]:
        for each in stream(0, batch_size=4, count=160, seed=0):
            taken.append(each)
            yield each

    with Reader(betons.train) as reader:
        before = threading.active_count()
        with closing(load(reader, endless(), workers=2, prefetch=2)) as batches:
            next(batches)
        assert threading.active_count() == before
    assert len(taken) == 3  # the one handed out and two ahead of it


def test_a_corrupt_sample_is_named_at_its_turn(betons: Betons, tmp_path: Path) -> None:
    copy = tmp_path / "copy.beton"
    shutil.copy(betons.train, copy)
    with Reader(copy) as reader:
        payload = bytes(reader.payload(7))
    data = bytearray(copy.read_bytes())
    begin = data.index(payload)
    data[begin : begin + len(payload)] = bytes(len(payload))
    copy.write_bytes(data)
    with Reader(copy) as reader:
        batches = load(reader, [rows(1, 2), rows(6, 7), rows(8)], workers=2)
        assert next(batches).indices.tolist() == [1, 2]
        with pytest.raises(BetonError, match=r"sample 7 \(class .*\) is not a readable JPEG"):
            next(batches)


def test_a_worker_that_dies_raises_in_the_main_thread(betons: Betons) -> None:
    with Reader(betons.train) as reader:
        batches = load(reader, stream(0, batch_size=4, count=160, seed=0), workers=2)
        next(batches)
        reader.close()  # what a worker reads next is gone
        with pytest.raises(ValueError, match="released memoryview"):
            list(batches)


def test_memory_holds_no_more_than_the_batches_ahead(tmp_path: Path) -> None:
    """Many threads, large batches, a slow reader: the bound is that of `prefetch`, whatever the number of threads."""
    side, batch_size, prefetch = 1000, 8, 2
    batch_bytes = batch_size * side * side * 3
    with Writer(tmp_path / "large.beton", capacity=batch_size, class_names=None) as writer:
        for index in range(batch_size):
            writer.append(StoredImage(RAW, side, side, bytes([index]) * (side * side * 3)))
    held = []
    with Reader(tmp_path / "large.beton") as reader:
        rows = stream(0, batch_size=batch_size, count=batch_size, seed=0)
        before = anonymous_bytes()
        with closing(load(reader, rows, workers=8, prefetch=prefetch)) as batches:
            for batch in islice(batches, 6):
                time.sleep(0.1)  # all that may be decoded is
                held.append(anonymous_bytes() - before)
                del batch
    assert max(held) < (prefetch + 1.5) * batch_bytes  # the one handed out, those ahead, and what numpy takes beside


def test_the_ceiling_holds_while_batches_are_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the threads that decoded a batch are slow to return to their pool."""
    set_result = Future.set_result

    def linger(future: Future[Any], result: Any) -> None:
        set_result(future, result)
        time.sleep(0.02)

    monkeypatch.setattr(Future, "set_result", linger)
    side, batch_size, prefetch = 400, 6, 2
    good = simplejpeg.encode_jpeg(np.zeros((side, side, 3), np.uint8))
    with Writer(tmp_path / "bad.beton", capacity=60, class_names=None) as writer:
        for index in range(60):
            writer.append(StoredImage(JPEG, side, side, bytes(100) if index % batch_size == 2 else good))
    with Reader(tmp_path / "bad.beton") as reader:
        asked = [rows(*range(first, first + batch_size)) for first in range(0, 60, batch_size)]
        batches = load(reader, asked, workers=2, prefetch=prefetch, on_error="skip")
        tracemalloc.start()
        try:
            while (batch := next(batches, None)) is not None:
                assert len(batch.skipped) == 1
                del batch
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        image = side * side * 3  # decoded once to see that it can stand in
        ceiling = max_load_bytes(reader, batch_size=batch_size, prefetch=prefetch)
    assert ceiling == (prefetch + 1) * (batch_size * image + 3 * side)
    assert peak < ceiling + 1.5 * image


def test_no_batch_takes_more_than_the_largest_images_together(tmp_path: Path) -> None:
    sides = [1, 9, 4, 2, 7]
    with Writer(tmp_path / "raw.beton", capacity=5, class_names=None) as writer:
        for side in sides:
            writer.append(StoredImage(RAW, side, 2 * side, bytes(6 * side * side)))
    with Reader(tmp_path / "raw.beton") as reader:
        for batch_size in range(1, 17):
            most = max_batch_bytes(reader, batch_size=batch_size)
            for seed in range(30):
                order = stream(seed, batch_size=batch_size, count=5, seed=seed)
                assert all(pack(reader, each).buffer_bytes() <= most for each in islice(order, 5))
    assert most <= 6 * (4 * sum(side * side for side in sides)) + 3 * max(sides)


def anonymous_bytes() -> int:
    """Measure the memory of this process that no file backs."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024
