"""Laws of the writer: FFCV's page rules, exact round trips, same input same bytes, whole or not there at all."""

from __future__ import annotations

import json
import shutil
import signal
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fastbyol.beton import JPEG, RAW, BetonError, Reader, StoredImage
from fastbyol.data_prep.partial import remove_stale
from fastbyol.data_prep.verify import verify
from fastbyol.data_prep.writer import BlockChecksums, Writer

ROOT = Path(__file__).parents[2]
PAGE = 1 << 21


def raw(width: int, height: int, seed: int = 0) -> StoredImage:
    """Draw a raw image."""
    return StoredImage(RAW, width, height, np.random.default_rng(seed).bytes(3 * width * height))


def write(path: Path, images: Sequence[StoredImage], *, capacity: int | None = None, labelled: bool = True) -> bytes:
    """Write images with labels 0, 1, 0, 1 ...; return the file's bytes."""
    names = ["cat", "dog"] if labelled else None
    with Writer(path, capacity=capacity or len(images), class_names=names, page_bytes=PAGE) as writer:
        for number, image in enumerate(images):
            writer.append(image, label=number % 2 if labelled else None)
    return path.read_bytes()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("labelled", [True, False], ids=["labelled", "unlabelled"])
@pytest.mark.parametrize("capacity", [9, 200_000], ids=["exact capacity", "larger capacity"])
def test_raw_round_trip_is_exact(tmp_path: Path, labelled: bool, capacity: int) -> None:
    images = [raw(1 + 100 * i, 701 - 50 * i, i) for i in range(9)]
    write(tmp_path / "a.beton", images, capacity=capacity, labelled=labelled)
    with Reader(tmp_path / "a.beton") as reader:
        assert [bytes(reader.payload(i)) for i in range(9)] == [image.data for image in images]
        assert reader.widths.tolist() == [image.width for image in images]
        assert reader.heights.tolist() == [image.height for image in images]
        assert reader.modes.tolist() == [RAW] * 9
        labels = None if reader.labels is None else reader.labels.tolist()
        assert labels == ([0, 1, 0, 1, 0, 1, 0, 1, 0] if labelled else None)
        assert reader.class_names == (["cat", "dog"] if labelled else None)


def test_bytes_are_those_of_the_format(tmp_path: Path) -> None:
    data = write(tmp_path / "a.beton", [StoredImage(JPEG, 7, 9, b"jpeg bytes"), raw(2, 1)])
    ends = 24 + 2 * 1041 + 2 * 24
    assert data[:24] == struct.pack("<HHIQQ", 2, 2, PAGE, 2, 2 * PAGE)
    assert data[24:1065] == struct.pack("<B16s1024x", 2, b"image")
    assert data[1065:2106] == struct.pack("<B16s1024x", 1, b"label")
    assert data[2106:2130] == struct.pack("<BHHQ3xq", 0, 7, 9, PAGE, 0)
    assert data[2130:ends] == struct.pack("<BHHQ3xq", 1, 2, 1, PAGE + 10, 1)
    assert not any(data[ends:PAGE])
    assert data[PAGE : PAGE + 16] == b"jpeg bytes" + raw(2, 1).data
    assert not any(data[PAGE + 16 : 2 * PAGE])
    assert data[2 * PAGE :] == struct.pack("<QQQQQQ", 0, PAGE, 10, 1, PAGE + 10, 6)


def test_unlabelled_file_has_one_field(tmp_path: Path) -> None:
    data = write(tmp_path / "a.beton", [raw(2, 1)], labelled=False)
    assert struct.unpack_from("<HH", data) == (2, 1)
    assert data[1065 : 1065 + 13] == struct.pack("<BHHQ", 1, 2, 1, PAGE)


def test_no_image_crosses_a_page(tmp_path: Path) -> None:
    # 1 MiB + 1 byte: two never fit a page of 2 MiB; then one page filled to the last byte, and one byte more.
    sizes = [2**20 + 1, 2**20 + 1, 2**20 - 1, 1, PAGE, 1, PAGE - 1, 1]
    data = write(tmp_path / "a.beton", [StoredImage(JPEG, 1, 1, bytes([i]) * size) for i, size in enumerate(sizes, 1)])
    with Reader(tmp_path / "a.beton") as reader:
        assert (reader.offsets // PAGE).tolist() == [1, 2, 2, 3, 4, 5, 5, 6]
        assert reader.sizes.tolist() == sizes
        assert [set(bytes(reader.payload(i))) for i in range(8)] == [{i} for i in range(1, 9)]
    assert (len(data) - 8 * 24) % PAGE == 0


def test_same_images_give_the_same_bytes(tmp_path: Path) -> None:
    images = [raw(40, 50, i) for i in range(20)]
    assert write(tmp_path / "a.beton", images) == write(tmp_path / "b.beton", images)
    assert (tmp_path / "a.beton.json").read_bytes() == (tmp_path / "b.beton.json").read_bytes()


def test_checksums_cover_every_byte(tmp_path: Path) -> None:
    data = write(tmp_path / "a.beton", [raw(700, 900, i) for i in range(3)], capacity=100_000)
    checksum = json.loads((tmp_path / "a.beton.json").read_text())["checksum"]
    assert checksum["block_bytes"] == PAGE
    assert checksum["crc32"] == [zlib.crc32(data[start : start + PAGE]) for start in range(0, len(data), PAGE)]


def test_checksum_does_not_depend_on_how_bytes_arrive() -> None:
    data = np.random.default_rng(0).bytes(1000)
    for step in (1, 7, 64, 100, 1000):
        sums = BlockChecksums(64)
        for start in range(0, 1000, step):
            sums.update(data[start : start + step])
        assert sums.blocks() == [zlib.crc32(data[start : start + 64]) for start in range(0, 1000, 64)]


def test_nothing_is_under_the_name_before_the_end(tmp_path: Path) -> None:
    with Writer(tmp_path / "a.beton", capacity=1, class_names=None) as writer:
        writer.append(raw(1, 1))
        assert not {"a.beton", "a.beton.json"} & set(names_in(tmp_path))
    assert names_in(tmp_path) == ["a.beton", "a.beton.json"]


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_interrupted_block_leaves_nothing(tmp_path: Path, interruption: type[BaseException]) -> None:
    def interrupted() -> None:
        with Writer(tmp_path / "a.beton", capacity=2, class_names=None) as writer:
            writer.append(raw(9, 9))
            raise interruption

    with pytest.raises(interruption):
        interrupted()
    assert names_in(tmp_path) == []


def test_interrupted_overwrite_leaves_the_old_pair(tmp_path: Path) -> None:
    before = write(tmp_path / "a.beton", [raw(3, 3)])
    sidecar = (tmp_path / "a.beton.json").read_bytes()

    def interrupted() -> None:
        with Writer(tmp_path / "a.beton", capacity=2, class_names=None, overwrite=True):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "a.beton").read_bytes() == before
    assert (tmp_path / "a.beton.json").read_bytes() == sidecar
    assert len(names_in(tmp_path)) == 2


def test_overwrite_replaces_both_files(tmp_path: Path) -> None:
    write(tmp_path / "a.beton", [raw(3, 3)] * 2)
    with Writer(tmp_path / "a.beton", capacity=1, class_names=None, overwrite=True) as writer:
        writer.append(raw(5, 5))
        writer.facts["note"] = "second"
    with Reader(tmp_path / "a.beton") as reader:
        assert (len(reader), reader.labels, reader.sidecar["note"]) == (1, None, "second")


# Overwrites argv[1] and kills itself, as kill -9 would, before its change number argv[2] of a name.
OVERWRITE_AND_DIE = """
import os, signal, sys
from pathlib import Path
from fastbyol.beton import RAW, StoredImage
from fastbyol.data_prep.writer import Writer

changes = 0

def count(event, arguments):
    global changes
    if event in ("os.remove", "os.rename"):
        changes += 1
        if changes == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

with Writer(Path(sys.argv[1]), capacity=1, class_names=["new"], overwrite=True) as writer:
    writer.append(StoredImage(RAW, 5, 5, bytes(75)), label=0)
    sys.addaudithook(count)
"""


def test_killed_anywhere_while_it_replaces_a_file_a_write_leaves_the_old_or_the_new_one(tmp_path: Path) -> None:
    path, seen = tmp_path / "a.beton", []
    for change in range(1, 20):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        write(path, [raw(3, 3)] * 2)
        command = [sys.executable, "-c", OVERWRITE_AND_DIE, str(path), str(change)]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        with Reader(path) as reader:
            seen.append((len(reader), reader.class_names and tuple(reader.class_names)))
            assert not list(verify(reader, workers=1))
        remove_stale(path)
        assert set(names_in(tmp_path)) <= {"a.beton", "a.beton.json"}
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert status == 0, "the last write was not killed"
    assert list(dict.fromkeys(seen)) == [(2, ("cat", "dog")), (2, None), (1, None), (1, ("new",))]


def test_the_name_never_disappears_while_files_replace_each_other(tmp_path: Path) -> None:
    path = tmp_path / "a.beton"
    write(path, [raw(3, 3)])

    def overwrite() -> None:
        for _ in range(50):
            with Writer(path, capacity=1, class_names=None, overwrite=True) as writer:
                writer.append(raw(5, 5))

    with ThreadPoolExecutor(1) as pool:
        done, looks = pool.submit(overwrite), 0
        while not done.done():
            assert path.exists()
            looks += 1
        done.result()
    assert looks > 50


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (raw(1, 1), 2, "label 2; give 0 to 1"),
        (raw(1, 1), -1, "label -1"),
        (StoredImage(JPEG, 0, 5, b"x"), 0, "0x5"),
        (StoredImage(JPEG, 5, 65536, b"x"), 0, "5x65536"),
        (StoredImage(JPEG, 5, 5, b""), 0, "0 bytes"),
        (StoredImage(RAW, 2, 2, b"x" * 11), 0, "11 bytes; wanted 12"),
        (StoredImage(JPEG, 5, 5, bytes(PAGE + 1)), 0, "a page holds"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(
    tmp_path: Path, image: StoredImage, label: int | None, message: str
) -> None:
    writer = Writer(tmp_path / "a.beton", capacity=1, class_names=["a", "b"], page_bytes=PAGE)
    with pytest.raises(BetonError, match=message), writer:
        writer.append(image, label=label)
    assert names_in(tmp_path) == []


def test_capacity_is_a_limit(tmp_path: Path) -> None:
    with pytest.raises(BetonError, match="capacity of 2"):
        write(tmp_path / "a.beton", [raw(1, 1)] * 3, capacity=2)


def test_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BetonError, match="no image was written"):
        write(tmp_path / "a.beton", [], capacity=2)
    assert names_in(tmp_path) == []


def test_output_is_checked_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.beton").write_text("mine")
    for name, message in {"a.beton": "exists", ".": "folder", "no/a.beton": "does not exist"}.items():
        with pytest.raises(BetonError, match=message):
            Writer(tmp_path / name, capacity=1, class_names=None)
    with pytest.raises(BetonError, match="power of two"):
        Writer(tmp_path / "b.beton", capacity=1, class_names=None, page_bytes=3 << 20)
    assert (tmp_path / "a.beton").read_text() == "mine"


def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    image = raw(30, 30)
    with Writer(tmp_path / "a.beton", capacity=20_000, class_names=None, page_bytes=PAGE) as writer:
        writer.append(image)
        tracemalloc.start()
        for _ in range(10_000):
            writer.append(image)
        # 37 B an image for record and table entry, bytearrays grow by an eighth, and one page of padding.
        assert tracemalloc.get_traced_memory()[1] < 10_000 * 60 + PAGE
        tracemalloc.stop()


def test_only_unfinished_files_of_dead_writes_are_removed(tmp_path: Path) -> None:
    dead = tmp_path / ".a.beton.01234567.partial"
    for path in (dead, tmp_path / ".a.beton.json.01234567.partial"):
        path.write_bytes(b"left")
    others = [
        tmp_path / name for name in (".b.beton.01234567.partial", ".a.beton.0123.partial", ".axbeton.01234567.partial")
    ]
    for path in others:
        path.write_bytes(b"not of this output")
    with Writer(tmp_path / "a.beton", capacity=1, class_names=None) as writer:
        assert remove_stale(tmp_path / "a.beton") == ([dead], [])
        writer.append(raw(1, 1))
    assert names_in(tmp_path) == sorted(["a.beton", "a.beton.json", *(path.name for path in others)])


def test_an_output_that_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def overtaken() -> None:
        with Writer(tmp_path / "a.beton", capacity=1, class_names=None) as writer:
            writer.append(raw(1, 1))
            (tmp_path / "a.beton").write_text("another write was faster")

    with pytest.raises(BetonError, match="output exists"):
        overtaken()
    assert names_in(tmp_path) == ["a.beton"]
    assert (tmp_path / "a.beton").read_text() == "another write was faster"


def test_writes_at_the_same_time_leave_one_whole_file(tmp_path: Path) -> None:
    """Both clean up before they begin; neither takes the other for dead, whichever ends first."""
    first, second = (Writer(tmp_path / "a.beton", capacity=1, class_names=None, overwrite=True) for _ in range(2))
    with first:
        assert remove_stale(tmp_path / "a.beton") == ([], [])
        with second:
            assert remove_stale(tmp_path / "a.beton") == ([], [])
            second.append(raw(2, 2))
        first.append(raw(3, 3))
    with Reader(tmp_path / "a.beton") as reader:
        assert reader.widths.tolist() == [3]
    assert names_in(tmp_path) == ["a.beton", "a.beton.json"]
