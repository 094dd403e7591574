"""Laws of vectors: those of evaluation, in order, the same bits after any stop, in every form of file."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from fastbyol.beton import UNLABELLED, Reader
from fastbyol.config import EncoderConfig
from fastbyol.embed import formats, vectors
from fastbyol.embed.formats import Embedding
from fastbyol.embed.vectors import Dtype, Partial, Vectors
from fastbyol.errors import ConfigError
from fastbyol.evaluate.features import OutOfTime, evenly_spaced, represent
from fastbyol.evaluate.images import InputSettings
from fastbyol.model.parts import Encoder, build_encoder
from tests.conftest import Betons, write_beton
from tests.support.full_disk import files_end_at

INPUTS = InputSettings(32, 1.0, workers=1)
ODD_NAMES = ["a/plain.jpg", 'quote".jpg', "comma, space.jpg", "<script>&amp;", "\u72d7/\u732b.jpg", "a\\nline.jpg"]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return build_encoder(EncoderConfig("resnet8", width=0.25, stem="cifar"), seed=0).eval()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write images for two whole batches and a part of one."""
    return write_beton(tmp_path_factory.mktemp("many") / "many.beton", 600, split="train")


def computed(
    encoder: Encoder,
    beton: Path,
    path: Path,
    *,
    key: str = "key",
    dtype: Dtype = "float32",
    has_unit_length: bool = False,
    on_error: str = "fail",
    stop: Callable[[], bool] = lambda: False,
) -> Vectors:
    inputs = InputSettings(32, 1.0, workers=1, on_error=on_error)
    with Reader(beton) as reader, Partial(path, key, width=encoder.features, dtype=dtype) as partial:
        vectors.compute(encoder, reader, inputs, partial, has_unit_length=has_unit_length, stop=stop)
        return partial.vectors()


def whole(found: Vectors) -> NDArray[Any]:
    return found.block(0, len(found))


def test_vectors_are_those_of_evaluation_in_the_order_of_the_file(
    encoder: Encoder, betons: Betons, tmp_path: Path
) -> None:
    with Reader(betons.train) as reader:
        wanted = represent(encoder, reader, evenly_spaced(len(reader), None), INPUTS).values
    found = computed(encoder, betons.train, tmp_path / "v")
    assert np.array_equal(whole(found), wanted.numpy())
    assert np.array_equal(found.samples, np.arange(160))
    assert np.array_equal(found.take(np.array([7, 3])), wanted[[7, 3]].numpy())
    half = computed(encoder, betons.train, tmp_path / "h", dtype="float16")
    assert np.array_equal(whole(half), wanted.half().numpy())
    unit = computed(encoder, betons.train, tmp_path / "u", has_unit_length=True)
    assert np.array_equal(whole(unit), F.normalize(wanted, dim=1).numpy())


def test_labels_are_not_needed(encoder: Encoder, betons: Betons, tmp_path: Path) -> None:
    assert len(computed(encoder, betons.unlabelled, tmp_path / "v")) == 40


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_a_stop_after_any_batch_changes_no_bit(encoder: Encoder, many: Path, tmp_path: Path, batches: int) -> None:
    undisturbed = whole(computed(encoder, many, tmp_path / "v"))
    left = iter([False] * batches + [True])
    with pytest.raises(OutOfTime):
        computed(encoder, many, tmp_path / "w", stop=lambda: next(left))
    with (tmp_path / "w").open("ab") as file:
        file.write(b"half a record")  # of a command that was killed
    with Partial(tmp_path / "w", "key", width=encoder.features, dtype="float32") as partial:
        assert partial.done == INPUTS.batch * batches
    assert np.array_equal(whole(computed(encoder, many, tmp_path / "w")), undisturbed)


def test_what_other_work_left_is_not_gone_on_with(encoder: Encoder, many: Path, tmp_path: Path) -> None:
    computed(encoder, many, tmp_path / "v")
    for key, dtype in (("another", "float32"), ("key", "float32")):  # the first left nothing of the second
        with Partial(tmp_path / "v", key, width=encoder.features, dtype=dtype) as partial:
            assert partial.done == 0
    (tmp_path / "v").write_bytes(b"\xff" * 1000)
    with Partial(tmp_path / "v", "key", width=encoder.features, dtype="float32") as partial:
        assert partial.done == 0
        with pytest.raises(ConfigError, match="another process writes"):
            Partial(tmp_path / "v", "key", width=encoder.features, dtype="float32")


def test_an_image_that_does_not_decode_is_left_out(encoder: Encoder, betons: Betons, tmp_path: Path) -> None:
    good = computed(encoder, betons.val, tmp_path / "v")
    with Reader(betons.val) as reader:
        offset, size = int(reader.offsets[17]), int(reader.sizes[17])
    damaged = bytearray(betons.val.read_bytes())
    damaged[offset : offset + size] = bytes(size)
    (tmp_path / "damaged.beton").write_bytes(damaged)
    found = computed(encoder, tmp_path / "damaged.beton", tmp_path / "w", on_error="skip")
    kept = np.delete(np.arange(60), 17)
    assert found.left_out == 1
    assert np.array_equal(found.samples, kept)
    np.testing.assert_allclose(whole(found), whole(good)[kept], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("value", "dtype", "said"), [(1e9, "float16", "--normalize"), (float("nan"), "float32", "div")]
)
def test_numbers_that_are_not_finite_are_refused(
    betons: Betons, tmp_path: Path, value: float, dtype: Dtype, said: str
) -> None:
    broken = build_encoder(EncoderConfig("resnet8", width=0.25, stem="cifar"), seed=0)
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter.mul_(value)
    with pytest.raises(ConfigError, match=said):
        computed(broken, betons.val, tmp_path / "v", dtype=dtype)


class Read:
    """What a file of vectors holds: names, labels (-1: none), vectors, classes and clusters where the form has them."""

    def __init__(self, path: Path) -> None:
        self.classes: list[str | None] | None = None
        self.clusters: list[int] | None = None
        getattr(self, f"_read_{path.suffix[1:]}")(path)

    def _read_parquet(self, path: Path) -> None:
        table = pq.read_table(path)
        self.names, self.classes = table["name"].to_pylist(), table["class"].to_pylist()
        self.labels = [UNLABELLED if label is None else label for label in table["label"].to_pylist()]
        self.vectors = np.stack(table["vector"].to_numpy())
        self.clusters = table["cluster"].to_pylist() if "cluster" in table.column_names else None

    def _read_npz(self, path: Path) -> None:
        with np.load(path) as arrays:
            self.names, self.labels, self.vectors = (arrays[name] for name in ("names", "labels", "vectors"))
            self.names, self.labels = self.names.tolist(), self.labels.tolist()
            self.clusters = arrays["clusters"].tolist() if "clusters" in arrays else None

    def _read_csv(self, path: Path) -> None:
        with path.open(newline="") as file:
            heads, *rows = csv.reader(file)
        self.names = [row[0] for row in rows]
        self.labels = [int(row[1]) if row[1] else UNLABELLED for row in rows]
        first = heads.index("v0")
        self.clusters = [int(row[2]) for row in rows] if first == 3 else None
        self.vectors = np.array([row[first:] for row in rows], np.float32)

    def _read_npy(self, path: Path) -> None:
        self.vectors, self.labels = np.load(path), None
        self.names = path.with_suffix(".names.txt").read_text().splitlines()
        beside = path.with_suffix(".clusters.npy")
        self.clusters = np.load(beside).tolist() if beside.exists() else None


@pytest.mark.parametrize("dtype", vectors.DTYPES)
@pytest.mark.parametrize("suffix", formats.FORMATS)
def test_every_form_gives_back_what_was_written(
    encoder: Encoder, betons: Betons, tmp_path: Path, suffix: str, dtype: Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "ROWS", 7)
    found = computed(encoder, betons.val, tmp_path / "v", dtype=dtype)
    names = [f"{number}-{ODD_NAMES[number % len(ODD_NAMES)]}" for number in range(60)]
    labels = np.arange(60) % 4 - 1
    written = Embedding(found, names, labels, ["x", "y", "<z>"], np.arange(60) % 5)
    formats.write(tmp_path / f"out{suffix}", written)
    read = Read(tmp_path / f"out{suffix}")
    assert read.names == names
    assert read.labels in (None, labels.tolist())
    assert read.classes in (None, [[None, "x", "y", "<z>"][number % 4] for number in range(60)])
    assert read.clusters == written.clusters.tolist()
    assert np.array_equal(read.vectors.astype(dtype), whole(found))
    assert suffix == ".csv" or read.vectors.dtype == dtype
    bare = Embedding(found, names, labels)
    formats.write(tmp_path / f"bare{suffix}", bare)
    assert Read(tmp_path / f"bare{suffix}").clusters is None


@pytest.mark.parametrize("suffix", formats.FORMATS)
def test_a_full_disk_leaves_no_half_file(encoder: Encoder, betons: Betons, tmp_path: Path, suffix: str) -> None:
    found = computed(encoder, betons.val, tmp_path / "v")
    with files_end_at(2000), pytest.raises(OSError, match="large"):
        formats.write(tmp_path / f"out{suffix}", Embedding(found, list("n" * 60), np.zeros(60, np.int64)))
    assert not list(tmp_path.glob("out*.partial"))
    assert not (tmp_path / f"out{suffix}").exists()
