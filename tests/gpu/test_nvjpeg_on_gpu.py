"""Laws of loader nvjpeg that only a GPU with JPEG decoders shows: its pixels, and that it writes no memory in use."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from fastbyol import jpeg, loaders
from fastbyol.beton import JPEG, RAW, BetonError, Reader, StoredImage
from fastbyol.data_prep.writer import Writer
from fastbyol.errors import ConfigError
from fastbyol.loaders import libnvjpeg, nvjpeg
from fastbyol.loaders.batch import Batch
from fastbyol.order import Rows, stream
from tests.support.tolerances import NVJPEG_LEVELS, NVJPEG_MEAN_LEVELS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

COUNT, BATCH = 61, 24
CHROMA = ("4:4:4", "4:2:2", "4:2:0")


@pytest.fixture(scope="module", autouse=True)
def _hardware() -> None:
    """Skip these tests where nvJPEG is not installed, or the GPU has no decoder."""
    try:
        nvjpeg.Decoder(libnvjpeg.open_library(), torch.device("cuda", 0)).close()
    except ConfigError as error:
        pytest.skip(str(error))


def picture(index: int) -> NDArray[np.uint8]:
    """Draw waves of up to two cycles in each colour: 64 x 64 to 300 x 400 pixels, odd sides among them."""
    random = np.random.default_rng(index)
    height, width = (int(side) for side in random.integers((64, 64), (300, 400)))
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(2 * np.pi * (a * x + b * y + c)) for a, b, c in random.uniform(-2, 2, (3, 3))]
    return np.stack([np.uint8(127.5 + 100 * wave) for wave in waves], 2)


def encode(index: int, **settings: Any) -> bytes:
    """Encode the picture of a sample, by turns in each proportion of chroma."""
    file = io.BytesIO()
    Image.fromarray(picture(index)).save(file, "JPEG", **{"quality": 90, "subsampling": index % 3} | settings)
    return file.getvalue()


def write(path: Path, changed: dict[int, bytes]) -> Path:
    """Write the pictures; every seventh is raw, every eleventh progressive."""
    with Writer(path, capacity=COUNT, class_names=None) as writer:
        for index in range(COUNT):
            image = picture(index)
            data = changed.get(index) or encode(index, progressive=index % 11 == 5)
            mode, data = (RAW, image.tobytes()) if index % 7 == 3 else (JPEG, data)
            writer.append(StoredImage(mode, image.shape[1], image.shape[0], data))
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a file of which the hardware decodes most."""
    return write(tmp_path_factory.mktemp("nvjpeg") / "pictures.beton", {})


def asked(start: int, count: int) -> list[Rows]:
    """Ask for batches of the file."""
    return list(islice(stream(start, batch_size=BATCH, count=COUNT, seed=2), count))


def load(reader: Reader, rows: list[Rows], **settings: Any) -> Iterator[Batch]:
    """Load batches by nvJPEG."""
    with closing(loaders.load("nvjpeg", reader, rows, workers=1, device="cuda", **settings)) as batches:
        yield from batches


def images(batch: Batch) -> list[NDArray[np.uint8]]:
    """Take the images of a batch apart, on the host."""
    pixels, found = batch.pixels.cpu().numpy(), []
    for offset, (height, width) in zip(batch.offsets.tolist(), batch.sizes.tolist(), strict=True):
        found.append(pixels[offset : offset + height * width * 3].reshape(height, width, 3))
    return found


def decoded(reader: Reader, index: int) -> NDArray[np.uint8]:
    """Decode a sample by libjpeg."""
    return picture(index) if reader.modes[index] == RAW else jpeg.decode(reader.payload(index))


def test_pixels_are_near_libjpegs_and_every_image_keeps_to_its_place(
    pictures: Path, record_property: Any, caplog: pytest.LogCaptureFixture
) -> None:
    means: dict[str, list[float]] = {chroma: [] for chroma in CHROMA}
    with Reader(pictures) as reader:
        for batch, rows in zip(load(reader, asked(0, 6)), asked(0, 6), strict=True):
            assert batch.indices.tolist() == rows.indices.tolist()
            for index, image in zip(batch.indices.tolist(), images(batch), strict=True):
                apart = np.abs(image.astype(int) - decoded(reader, index))
                is_exact = index % 7 == 3 or index % 11 == 5  # raw, or decoded by libjpeg
                assert apart.mean() <= (0 if is_exact else NVJPEG_MEAN_LEVELS), f"sample {index}"
                if not is_exact:
                    means[CHROMA[index % 3]].append(float(apart.mean()))
                    assert index % 3 or apart.max() <= NVJPEG_LEVELS, f"sample {index}"
    for chroma, values in means.items():
        record_property(f"levels apart on average, {chroma}", float(np.mean(values)))
        print(f"{chroma}: {np.mean(values):.3f} levels apart on average, at most {np.max(values):.3f} in an image")
    assert [message for message in caplog.messages if "libjpeg" in message and "progressive" not in message] == []


def test_small_images_come_whole_whoever_decodes_them(tmp_path: Path) -> None:
    sizes = [(1, 1), (1, 40), (40, 1), (7, 5), (8, 8), (15, 17), (16, 16), (33, 31)]
    with Writer(tmp_path / "small.beton", capacity=len(sizes), class_names=None) as writer:
        for number, (height, width) in enumerate(sizes):
            image, file = Image.new("RGB", (width, height), (200, 30 * number, 90)), io.BytesIO()
            image.save(file, "JPEG", quality=95)
            writer.append(StoredImage(JPEG, width, height, file.getvalue()))
    rows = [Rows(np.arange(len(sizes)), np.zeros(len(sizes), np.int64))]
    with Reader(tmp_path / "small.beton") as reader:
        (batch,) = load(reader, rows)
        for index, image in enumerate(images(batch)):
            apart = np.abs(image.astype(int) - jpeg.decode(reader.payload(index)))
            assert apart.max() <= NVJPEG_LEVELS, f"{sizes[index]}"


def test_the_same_order_has_the_same_bits_from_wherever_it_is_resumed(pictures: Path) -> None:
    with Reader(pictures) as reader:
        whole = [images(batch) for batch in load(reader, asked(0, 7))]
        for k in (0, 3):
            late = [images(batch) for batch in load(reader, asked(k, 7 - k))]
            for one, other in zip(whole[k:], late, strict=True):
                assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_memory_that_queued_work_still_reads_is_not_written(pictures: Path) -> None:
    """The batch is dropped before the GPU has come to the sum of its pixels, as in training."""
    with Reader(pictures) as reader:
        wanted = [int(batch.pixels.sum()) for batch in load(reader, asked(0, 12))]
        sums = []
        for batch in load(reader, asked(0, 12)):
            torch.cuda._sleep(50_000_000)  # some 30 ms
            sums.append(batch.pixels.sum())
    assert [int(each) for each in sums] == wanted


def test_bad_samples_are_named_or_replaced(tmp_path: Path) -> None:
    cut, other = encode(4)[:-300], encode(9)
    path = write(tmp_path / "bad.beton", {2: bytes(500), 4: cut, 8: other})
    with Reader(path) as reader:
        for index in (2, 4, 8):
            rows = Rows(np.array([0, index, 1]), np.zeros(3, np.int64))
            with pytest.raises(BetonError, match=f"sample {index} .*write the file anew"):
                list(load(reader, [rows]))
        for batch, rows in zip(load(reader, asked(0, 6), on_error="skip"), asked(0, 6), strict=True):
            assert batch.indices.tolist() == [{2: 3, 4: 5, 8: 9}.get(index, index) for index in rows.indices.tolist()]
            assert sorted(batch.skipped) == sorted(index for index in rows.indices.tolist() if index in (2, 4, 8))


def test_damage_inside_an_image_changes_no_other(pictures: Path, tmp_path: Path) -> None:
    """Hardware may decode damaged data without an error; its neighbours in the batch stay as they are."""
    data = bytearray(encode(6))
    data[-200:-150] = np.random.default_rng(0).integers(0, 255, 50, np.uint8).tobytes()
    path = write(tmp_path / "damaged.beton", {6: bytes(data)})
    rows = [Rows(np.arange(COUNT), np.zeros(COUNT, np.int64))]
    with Reader(path) as reader, Reader(pictures) as whole:
        (found,), (wanted,) = load(reader, rows, on_error="skip"), load(whole, rows)
        for index, (one, other) in enumerate(zip(images(found), images(wanted), strict=True)):
            assert index == 6 or np.array_equal(one, other), f"sample {index}"
