"""Laws of loader nvjpeg, as far as a host shows them: a library on the host stands in for the GPU's decoders."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image

from fastbyol import loaders
from fastbyol.beton import JPEG, RAW, BetonError, Reader, StoredImage
from fastbyol.data_prep.writer import Writer
from fastbyol.errors import ConfigError
from fastbyol.loaders import libnvjpeg, nvjpeg
from fastbyol.loaders.batch import Batch
from fastbyol.loaders.libnvjpeg import NvJpegError, Status
from fastbyol.loaders.nvjpeg_headers import fault_of_header
from fastbyol.loaders.stand_ins import StandIns
from fastbyol.order import Rows, stream
from tests.conftest import Betons
from tests.support.host_nvjpeg import HostNvJpeg, HostStream

COUNT, BATCH = 23, 8
GRAY, PROGRESSIVE, LONGER, SMALL = 3, 6, 10, 12  # samples that hardware refuses, or of one pixel


def picture(index: int) -> NDArray[np.uint8]:
    """Draw a smooth image of its own size, one of a single pixel."""
    random = np.random.default_rng(index)
    height, width = (1, 1) if index == SMALL else random.integers(5, 60, 2)
    coarse = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return np.ascontiguousarray(coarse.repeat(8, 0).repeat(8, 1)[:height, :width])


def jpeg(image: NDArray[np.uint8], mode: str = "RGB", **settings: Any) -> bytes:
    """Encode an image by Pillow."""
    file = io.BytesIO()
    Image.fromarray(image).convert(mode).save(file, "JPEG", **settings)
    return file.getvalue()


def payload(index: int) -> bytes:
    """Encode the JPEG of a sample."""
    special = {GRAY: {"mode": "L"}, PROGRESSIVE: {"progressive": True}}
    return jpeg(picture(index), **special.get(index, {})) + bytes(3 if index == LONGER else 0)


def write(path: Path, changed: dict[int, bytes]) -> Path:
    """Write the samples, some with other bytes; every fifth is raw."""
    with Writer(path, capacity=COUNT, class_names=None) as writer:
        for index in range(COUNT):
            height, width, _ = picture(index).shape
            if index % 5 == 4:
                writer.append(StoredImage(RAW, width, height, picture(index).tobytes()))
            else:
                writer.append(StoredImage(JPEG, width, height, changed.get(index, payload(index))))
    return path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a file of which the hardware decodes most JPEGs."""
    return write(tmp_path_factory.mktemp("nvjpeg") / "mixed.beton", {})


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> HostNvJpeg:
    """Make a library of the host, and CUDA's streams and events no work."""
    monkeypatch.setattr(torch.cuda, "Stream", HostStream)
    monkeypatch.setattr(torch.cuda, "Event", HostStream)
    return HostNvJpeg()


def loaded(library: HostNvJpeg, reader: Reader, rows: list[Rows], *, on_error: str = "fail") -> Iterator[Batch]:
    """Load batches to memory of the host."""
    decoder = nvjpeg.Decoder(cast(libnvjpeg.Library, library), torch.device("cpu"))
    with closing(nvjpeg.assemble(reader, rows, StandIns(reader, on_error=on_error), decoder)) as batches:
        yield from batches


def asked(start: int, count: int) -> list[Rows]:
    """Ask for batches of the file."""
    return list(islice(stream(start, batch_size=BATCH, count=COUNT, seed=1), count))


def images(batch: Batch) -> list[NDArray[np.uint8]]:
    """Take the images of a batch apart."""
    ends = (batch.offsets + 3 * batch.sizes.prod(1)).tolist()
    return [batch.pixels[begin:end].numpy().copy() for begin, end in zip(batch.offsets.tolist(), ends, strict=True)]


def check(batch: Batch, indices: list[int]) -> None:
    """Compare a batch with what loader native decodes of these samples."""
    assert batch.indices.tolist() == indices
    for index, image in zip(indices, images(batch), strict=True):
        decoded = picture(index) if index % 5 == 4 else simplejpeg.decode_jpeg(payload(index), "RGB")
        assert np.array_equal(image, decoded.reshape(-1)), f"sample {index}"


def test_batches_are_those_of_loader_native_whoever_decodes_an_image(library: HostNvJpeg, mixed: Path) -> None:
    rows = [*asked(0, 6), Rows(np.array([4, 14]), np.zeros(2, np.int64)), Rows(np.array([2, 2]), np.arange(2))]
    with Reader(mixed) as reader:
        for batch, each in zip(loaded(library, reader, rows), rows, strict=True):
            check(batch, each.indices.tolist())
            assert batch.epochs.tolist() == each.epochs.tolist()
    on_host = {GRAY, PROGRESSIVE, LONGER} | set(range(4, COUNT, 5))
    assert sum(library.batches) == sum(index not in on_host for each in rows for index in each.indices.tolist())
    assert not library.live


@pytest.mark.parametrize("k", [0, 1, 5])
def test_a_resumed_order_gives_the_same_pixels(library: HostNvJpeg, mixed: Path, k: int) -> None:
    with Reader(mixed) as reader:
        *_, walked = loaded(library, reader, asked(0, k + 1))
        (late,) = loaded(library, reader, asked(k, 1))
    assert all(np.array_equal(a, b) for a, b in zip(images(walked), images(late), strict=True))


def test_each_refused_image_is_named_once_and_the_first_of_a_kind_in_a_warning(
    library: HostNvJpeg, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    progressive = {1: jpeg(picture(1), progressive=True)}
    path = write(tmp_path / "two.beton", progressive)
    with Reader(path) as reader, caplog.at_level(logging.INFO):
        for _ in loaded(library, reader, asked(0, 9)):
            pass
    named = [record for record in caplog.records if "decoded by libjpeg" in record.getMessage()]
    assert sorted(record.levelno for record in named) == [logging.INFO, *3 * [logging.WARNING]]
    lines = [record.getMessage() for record in named]
    assert any("sample 1 is" in line for line in lines)
    for index, reason in ((GRAY, "three components"), (PROGRESSIVE, "progressive"), (LONGER, "end marker")):
        assert any(f"sample {index} is decoded by libjpeg" in line and reason in line for line in lines)


@pytest.mark.parametrize("how", ["refused", "skipped"])
def test_an_image_that_the_hardware_fails_on_is_found_and_decoded_by_libjpeg(
    library: HostNvJpeg, mixed: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    setattr(library, how, payload(7))
    rows = Rows(np.arange(COUNT), np.zeros(COUNT, np.int64))
    with Reader(mixed) as reader:
        first, second = loaded(library, reader, [rows, rows])
    check(first, rows.indices.tolist())
    check(second, rows.indices.tolist())
    reason = {"refused": "returned 4 (JPEG_NOT_SUPPORTED)", "skipped": "did not write it"}[how]
    assert sum("sample 7 is" in line and reason in line for line in caplog.messages) == 1


def test_an_error_that_is_no_images_ends_the_loading(library: HostNvJpeg, mixed: Path) -> None:
    library.decode_status = Status.ALLOCATOR_FAILURE
    with Reader(mixed) as reader, pytest.raises(NvJpegError, match=r"nvjpegDecodeBatched returned 5 \(ALLOCATOR_FAIL"):
        list(loaded(library, reader, asked(0, 1)))
    assert not library.live


def test_a_bad_sample_is_named_and_no_warning_says_that_libjpeg_decodes_it(
    library: HostNvJpeg, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other_size = jpeg(picture(2)[:-1].copy())
    cut, closed = payload(7)[:-40], payload(8)[:-40] + b"\xff\xd9"  # the last only decoding tells
    for index, data in ((1, bytes(500)), (2, other_size), (7, cut), (8, closed)):
        path = write(tmp_path / f"{index}.beton", {index: data})
        rows = Rows(np.array([0, index, 5]), np.zeros(3, np.int64))
        with Reader(path) as reader, pytest.raises(BetonError, match=f"sample {index} .*write the file anew"):
            list(loaded(library, reader, [rows]))
    assert not caplog.messages
    assert not library.live


def test_a_bad_sample_is_replaced_by_the_next_good_one_with_the_same_pixels_after_a_resume(
    library: HostNvJpeg, tmp_path: Path
) -> None:
    path = write(tmp_path / "bad.beton", {1: bytes(500), 22: bytes(500)})
    rows, stand_ins = asked(0, 7), {1: 2, 22: 0}
    with Reader(path) as reader:
        whole = list(loaded(library, reader, rows, on_error="skip"))
        late = list(loaded(library, reader, rows[3:], on_error="skip"))
    for batch, each in zip(whole, rows, strict=True):
        check(batch, [stand_ins.get(index, index) for index in each.indices.tolist()])
        assert sorted(batch.skipped) == sorted(index for index in each.indices.tolist() if index in stand_ins)
    for one, other in zip(whole[3:], late, strict=True):
        assert one.indices.tolist() == other.indices.tolist()
        assert sorted(one.skipped) == sorted(other.skipped)


def test_closing_early_destroys_all_handles(library: HostNvJpeg, mixed: Path) -> None:
    with Reader(mixed) as reader:
        batches = loaded(library, reader, asked(0, 5))
        next(batches)
        assert library.live
        cast(Any, batches).close()
        assert not library.live
        nvjpeg.Decoder(cast(libnvjpeg.Library, library), torch.device("cpu"))
        assert not library.live  # also where nothing was loaded


def test_only_whole_baseline_jpegs_of_ycbcr_are_for_the_hardware() -> None:
    image = picture(0)
    height, width, _ = image.shape
    adobe = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\0"  # no transform
    good, end = jpeg(image), b"\xff\xd9"
    one_of_three = good.replace(b"\xff\xda\0\x0c\3", b"\xff\xda\0\x0c\1")
    cases = {
        "": [good, jpeg(image, comment=b"x"), jpeg(image, subsampling=0), jpeg(image, restart_marker_blocks=1)],
        "end marker": [good[:-2], good + b"\0"],
        "not baseline": [jpeg(image, progressive=True)],
        "three components": [jpeg(image, "L"), jpeg(image, "CMYK"), one_of_three],
        "stored as RGB": [good[:2] + adobe + good[2:], jpeg(image, keep_rgb=True)],
        "another size": [jpeg(image[:-1].copy())],
        "no baseline": [bytes(30) + end, good[:4] + end, end, good[:2] + b"\xff\xe0\xff\xff" + end],
    }
    for reason, payloads in cases.items():
        for data in payloads:
            found = fault_of_header(memoryview(data), height, width)
            assert reason in found
            assert bool(reason) == bool(found), found


def test_no_header_is_too_broken_to_be_read() -> None:
    data, random = payload(0), np.random.default_rng(0)
    for size in range(len(data)):
        assert fault_of_header(memoryview(data[:size] + b"\xff\xd9"), 8, 8)
    for _ in range(300):
        broken = np.frombuffer(data, np.uint8).copy()
        broken[random.integers(2, 400, 4)] = random.choice([0, 1, 0xC0, 0xDA, 0xFF], 4)
        fault_of_header(memoryview(broken.tobytes()), 8, 8)


def test_without_a_gpu_or_the_library_one_line_says_what_to_do(betons: Betons, monkeypatch: pytest.MonkeyPatch) -> None:
    with Reader(betons.train) as reader, pytest.raises(ConfigError, match="the device is cpu; give --loader native"):
        loaders.load("nvjpeg", reader, [], workers=1)
    monkeypatch.setattr(libnvjpeg, "MAJORS", (0,))
    with pytest.raises(ConfigError, match=r"pip install 'fastbyol\[nvjpeg\]'") as raised:
        libnvjpeg.open_library()
    assert "\n" not in str(raised.value)


def test_a_gpu_without_decoders_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", HostStream)
    library = HostNvJpeg(create_status=Status.ARCH_MISMATCH)
    with pytest.raises(ConfigError, match=r"finds no JPEG decoder in cpu .*7 \(ARCH_MISMATCH\).*give --loader native"):
        nvjpeg.Decoder(cast(libnvjpeg.Library, library), torch.device("cpu"))
    assert not library.live
