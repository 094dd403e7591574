"""Laws of the file format against the ffcv package: it reads what we write, we read what it writes, byte by byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray

from fastbyol.beton import JPEG, RAW, Reader, StoredImage
from fastbyol.data_prep.writer import Writer

pytestmark = pytest.mark.peers
ffcv = pytest.importorskip("ffcv")

PAGE_BYTES = 1 << 21
COUNT = 300


def picture(index: int) -> NDArray[np.uint8]:
    """Draw an image of its own size and gray level."""
    height, width = np.random.default_rng(index).integers(9, 400, 2)
    return np.full((height, width, 3), index % 256, np.uint8)


def check_same_facts(path: Path) -> Any:
    """Compare every fact of the file as both readers see it; return ffcv's reader."""
    from ffcv.reader import Reader as FFCVReader  # noqa: PLC0415

    theirs = FFCVReader(str(path))
    with Reader(path) as ours:
        assert len(ours) == theirs.num_samples
        assert ours.page_bytes == theirs.page_size
        assert ours.field_names == theirs.field_names
        record = theirs.metadata[f"f{theirs.field_names.index('image')}"]
        assert np.array_equal(ours.modes, record["mode"])
        assert np.array_equal(ours.widths, record["width"])
        assert np.array_equal(ours.heights, record["height"])
        assert np.array_equal(ours.offsets, record["data_ptr"])
        size = dict(zip(theirs.alloc_table["ptr"].tolist(), theirs.alloc_table["size"].tolist(), strict=True))
        assert ours.sizes.tolist() == [size[ptr] for ptr in ours.offsets.tolist()]
        if ours.labels is not None:
            assert np.array_equal(ours.labels, theirs.metadata[f"f{theirs.field_names.index('label')}"].ravel())
    return theirs


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("os_cache", [True, False])
def test_ffcv_reads_what_we_write(tmp_path: Path, labelled: bool, os_cache: bool) -> None:
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder  # noqa: PLC0415
    from ffcv.loader import Loader, OrderOption  # noqa: PLC0415

    images = np.random.default_rng(0).integers(0, 256, (COUNT, 24, 40, 3), np.uint8)
    path = tmp_path / "ours.beton"
    with Writer(
        path, capacity=2 * COUNT, class_names=["a", "b"] if labelled else None, page_bytes=PAGE_BYTES
    ) as writer:
        for index, image in enumerate(images):
            if index % 2:
                stored = StoredImage(RAW, 40, 24, image.tobytes())
            else:
                stored = StoredImage(JPEG, 40, 24, simplejpeg.encode_jpeg(image, quality=90))
            writer.append(stored, label=index % 2 if labelled else None)
    check_same_facts(path)
    pipelines: dict[str, Any] = {"image": [SimpleRGBImageDecoder()]}
    if labelled:
        pipelines["label"] = [IntDecoder()]
    batches = [
        (pixels.copy(), *(label.ravel().copy() for label in labels))
        for pixels, *labels in Loader(
            str(path),
            batch_size=64,
            num_workers=1,
            os_cache=os_cache,
            order=OrderOption.SEQUENTIAL,
            drop_last=False,
            pipelines=pipelines,
        )
    ]
    pixels = np.concatenate([batch[0] for batch in batches])
    assert len(pixels) == COUNT
    assert np.array_equal(pixels[1::2], images[1::2])
    with Reader(path) as reader:
        for index in range(0, COUNT, 2):
            wanted = simplejpeg.decode_jpeg(bytes(reader.payload(index)), "RGB", fastdct=True)
            assert np.array_equal(pixels[index], wanted)
    if labelled:
        assert np.concatenate([batch[1] for batch in batches]).tolist() == [index % 2 for index in range(COUNT)]


class Pictures:
    """Be a dataset as ffcv's writer wants it."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return (
            float(index),
            picture(index),
            np.frombuffer(b"x" * (index % 5), np.uint8),
            3 * index - 5,
            {"i": int(index)},
        )


@pytest.mark.parametrize("mode", ["jpg", "raw", "proportion", "smart"])
@pytest.mark.parametrize("writers", [1, 3])
def test_we_read_what_ffcv_writes(tmp_path: Path, mode: str, writers: int) -> None:
    from ffcv.fields import BytesField, FloatField, IntField, JSONField, RGBImageField  # noqa: PLC0415
    from ffcv.writer import DatasetWriter  # noqa: PLC0415

    path = tmp_path / "theirs.beton"
    fields = {
        "weight": FloatField(),
        "image": RGBImageField(write_mode=mode, smart_threshold=100_000, max_resolution=300),
        "note": BytesField(),
        "label": IntField(),
        "facts": JSONField(),
    }
    DatasetWriter(str(path), fields, num_workers=writers, page_size=PAGE_BYTES).from_indexed_dataset(
        Pictures(), chunksize=10, shuffle_indices=False
    )
    check_same_facts(path)
    with Reader(path) as reader:
        assert reader.labels is not None
        assert reader.labels.tolist() == [3 * index - 5 for index in range(COUNT)]
        expected_modes = {"jpg": {JPEG}, "raw": {RAW}}.get(mode, {JPEG, RAW})
        assert set(reader.modes.tolist()) == expected_modes
        for index in range(COUNT):
            payload, size = reader.payload(index), (int(reader.heights[index]), int(reader.widths[index]), 3)
            is_raw = reader.modes[index] == RAW
            image = np.frombuffer(payload, np.uint8) if is_raw else simplejpeg.decode_jpeg(bytes(payload), "RGB")
            image = image.reshape(size)
            assert max(image.shape) <= 300
            assert abs(float(image.mean()) - index % 256) <= 2
