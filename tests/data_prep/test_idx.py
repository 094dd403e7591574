"""Laws of MNIST's files: every pixel as it is in them, labels from the file beside, no size believed."""

from __future__ import annotations

import gzip
import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastbyol.beton import RAW, Reader
from fastbyol.data_prep.cli import main
from fastbyol.data_prep.sources import open_source
from fastbyol.data_prep.sources.base import SourceError
from tests.support.layouts import contents, lay_out

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 28, 27)).astype(np.uint8)
OF_ROW = (3, 0, 9, 3, 1)


def idx(*shape: int, data: bytes, kind: int = 8) -> bytes:
    """Make an idx file."""
    return struct.pack(f">HBB{len(shape)}I", 0, kind, len(shape), *shape) + data


GOOD_IMAGES, GOOD_LABELS = idx(5, 28, 27, data=PIXELS.tobytes()), idx(5, data=bytes(OF_ROW))


@pytest.mark.parametrize("packed", ["", "images", "labels", "images and labels"])
def test_images_have_the_labels_of_the_file_beside_them(tmp_path: Path, packed: str) -> None:
    files = {}
    for what, name, data in (("images", IMAGES, GOOD_IMAGES), ("labels", LABELS, GOOD_LABELS)):
        files |= {f"{name}.gz": gzip.compress(data)} if what in packed else {name: data}
    path = lay_out(tmp_path, files) / next(name for name in files if "images" in name)
    source = open_source(path)
    found = contents(source)
    assert source.class_names == [str(number) for number in range(10)]
    assert source.class_counts == [1, 1, 0, 2, 0, 0, 0, 0, 0, 1]
    assert [label for _, label, _ in found] == list(OF_ROW)
    assert [name for name, _, _ in found] == [f"{path.name} image {number}" for number in range(5)]
    decoded = np.stack([np.asarray(Image.open(io.BytesIO(data))) for _, _, data in found])
    np.testing.assert_array_equal(decoded, PIXELS)
    assert contents(source) == found


def test_names_with_a_dot_find_their_labels(tmp_path: Path) -> None:
    lay_out(tmp_path, {"t10k-images.idx3-ubyte": GOOD_IMAGES, "t10k-labels.idx1-ubyte": GOOD_LABELS})
    assert open_source(tmp_path / "t10k-images.idx3-ubyte").class_names is not None


def test_pixels_are_stored_as_they_are(tmp_path: Path) -> None:
    lay_out(tmp_path, {IMAGES: GOOD_IMAGES, LABELS: GOOD_LABELS})
    assert main(["write", str(tmp_path / IMAGES), str(tmp_path / "a.beton")]) == 0
    with Reader(tmp_path / "a.beton") as reader:
        assert set(reader.modes.tolist()) == {RAW}
        assert reader.labels is not None
        assert reader.labels.tolist() == list(OF_ROW)
        stored = np.stack([np.frombuffer(reader.payload(i), np.uint8).reshape(28, 27, 3) for i in range(5)])
    np.testing.assert_array_equal(stored, np.repeat(PIXELS[..., None], 3, axis=3))


def test_labels_are_needed_unless_none_are_wanted(tmp_path: Path) -> None:
    path = lay_out(tmp_path, {IMAGES: GOOD_IMAGES}) / IMAGES
    with pytest.raises(SourceError, match=f"no labels in {LABELS} beside it; copy them there, or give --labels none"):
        open_source(path)
    source = open_source(path, labels="none")
    assert (source.class_names, source.count) == (None, 5)
    with pytest.raises(SourceError, match="--label-column x is given, which an idx file has no use for"):
        open_source(path, label_column="x")


def test_new_labels_are_a_new_conversion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lay_out(tmp_path, {IMAGES: GOOD_IMAGES, "cache/x": b""})
    said = []
    for labels in (GOOD_LABELS, gzip.compress(GOOD_LABELS)):
        (tmp_path / LABELS).unlink(missing_ok=True)
        lay_out(tmp_path, {LABELS: labels})
        for _ in range(2):
            assert main(["write", str(tmp_path / IMAGES), str(tmp_path / "cache")]) == 0
            said.append("unchanged" in capsys.readouterr().out)
    assert said == [False, True, False, True]


def test_their_folder_says_which_file_to_give(tmp_path: Path) -> None:
    lay_out(tmp_path, {IMAGES: GOOD_IMAGES, LABELS: GOOD_LABELS, "t10k-images-idx3-ubyte.gz": b""})
    with pytest.raises(SourceError, match=r"give .*/t10k-images-idx3-ubyte\.gz or .*/train-images-idx3-ubyte"):
        open_source(tmp_path)


FAULTS: dict[str, tuple[bytes, bytes, str]] = {
    "more said than there": (idx(6, 28, 27, data=PIXELS.tobytes()), GOOD_LABELS, "holds 3780 values .* says 4536"),
    "less said than there": (idx(4, 28, 27, data=PIXELS.tobytes()), GOOD_LABELS, "holds 3780 values .* says 3024"),
    "far more": (idx(1 << 31, 1 << 8, 1 << 8, data=b""), GOOD_LABELS, "holds 0 values where its header says"),
    "huge image": (idx(1, 1 << 31, 1 << 31, data=b""), GOOD_LABELS, "wanted images, as in train-images-idx3-ubyte"),
    "no pixels": (idx(5, 0, 28, data=b""), GOOD_LABELS, "wanted images"),
    "no images": (idx(0, 28, 28, data=b""), idx(0, data=b""), "holds no images"),
    "labels alone": (GOOD_LABELS, GOOD_LABELS, "an array of 5; wanted images"),
    "colour": (idx(5, 28, 28, 3, data=bytes(11760)), GOOD_LABELS, "an array of 5 x 28 x 28 x 3; wanted images"),
    "cut header": (GOOD_IMAGES[:9], GOOD_LABELS, "no idx file of bytes, or cut short"),
    "no dimensions": (b"\0\0\x08\0", GOOD_LABELS, "no idx file of bytes"),
    "few labels": (GOOD_IMAGES, idx(4, data=bytes(4)), "an array of 4 labels for 5 images"),
    "cut labels": (GOOD_IMAGES, GOOD_LABELS[:-1], "holds 4 values where its header says 5"),
    "long labels": (GOOD_IMAGES, GOOD_LABELS + b"\0", "holds 6 values where its header says 5"),
    "images as labels": (GOOD_IMAGES, GOOD_IMAGES, "an array of 5 x 28 x 27 labels"),
    "labels of floats": (GOOD_IMAGES, idx(5, data=bytes(20), kind=13), "no idx file of bytes"),
    "labels that are text": (GOOD_IMAGES, b"3\n0\n9\n", "no idx file of bytes"),
}


@pytest.mark.parametrize("case", FAULTS)
@pytest.mark.parametrize("is_packed", [False, True], ids=["plain", "gzip"])
def test_sizes_that_do_not_fit_are_named(tmp_path: Path, case: str, is_packed: bool) -> None:
    images, labels, message = FAULTS[case]
    pack = gzip.compress if is_packed else bytes
    lay_out(tmp_path, {IMAGES: pack(images), LABELS: pack(labels)})
    with pytest.raises(SourceError, match=message) as caught:
        open_source(tmp_path / IMAGES)
    assert str(tmp_path) in str(caught.value)


def test_damaged_gzip_is_named(tmp_path: Path) -> None:
    packed = gzip.compress(GOOD_IMAGES)
    for damaged in (packed[:-20], packed[:-8] + bytes(8), packed[:200] + b"\xff" * 200 + packed[400:]):
        lay_out(tmp_path, {f"{IMAGES}.gz": damaged, LABELS: GOOD_LABELS})
        with pytest.raises(SourceError, match=rf"{IMAGES}\.gz: cannot be read: .*; download it again"):
            open_source(tmp_path / f"{IMAGES}.gz")
