"""The demo set's laws: deterministic, balanced, splits apart, and no class shown by its colour."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from fastbyol import beton
from fastbyol.data_prep import demo


def test_same_seed_same_bytes() -> None:
    first, again = (demo.draw(200, seed=3, split="train") for _ in range(2))
    assert first[0].tobytes() == again[0].tobytes()
    assert np.array_equal(first[1], again[1])


def test_pixels_are_pinned() -> None:
    """Correctly rounded arithmetic draws them, the same everywhere; a change here changes the README's scores."""
    images, labels = demo.draw(100, seed=0, split="train")
    assert hashlib.sha256(images.tobytes() + labels.astype("<i8").tobytes()).hexdigest() == (
        "50a2dc16f655fd61c6e45ec7e153bef6bb0a4848c5f110d16a85bf423cc2be68"
    )


@pytest.mark.parametrize("other", [(1, "train"), (0, "val")], ids=["seed", "split"])
def test_other_seed_or_split_other_images(other: tuple[int, str]) -> None:
    images, labels = demo.draw(200, seed=0, split="train")
    others, other_labels = demo.draw(200, seed=other[0], split=other[1])
    assert not np.array_equal(labels, other_labels)
    assert {image.tobytes() for image in images}.isdisjoint(image.tobytes() for image in others)


def test_no_image_occurs_twice_in_train_and_val() -> None:
    images = [*demo.draw(2000, seed=0, split="train")[0], *demo.draw(500, seed=0, split="val")[0]]
    assert len({image.tobytes() for image in images}) == 2500


@pytest.mark.parametrize("count", [1, 7, 10, 203])
def test_classes_are_balanced(count: int) -> None:
    images, labels = demo.draw(count, seed=0, split="val")
    assert images.shape == (count, 32, 32, 3)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    sizes = np.bincount(labels, minlength=len(demo.CLASS_NAMES))
    assert len(sizes) == len(demo.CLASS_NAMES) == 10
    assert sizes.max() - sizes.min() <= 1


def test_labels_come_in_random_order() -> None:
    """The first tenth of 2000 labels holds 20 of each class, give or take five standard deviations of 4.1."""
    sizes = np.bincount(demo.draw(2000, seed=0, split="train")[1][:200], minlength=10)
    assert np.abs(sizes - 20).max() < 21


def test_mean_colour_does_not_tell_the_class() -> None:
    """Nearest class mean over mean RGB: chance is 0.1 with a standard deviation of 0.01 over 1000 images."""
    images, labels = demo.draw(2000, seed=0, split="train")
    probes, wanted = demo.draw(1000, seed=0, split="val")
    colours = images.mean(axis=(1, 2))
    means = np.stack([colours[labels == label].mean(axis=0) for label in range(10)])
    distances = ((probes.mean(axis=(1, 2))[:, None] - means) ** 2).sum(axis=-1)
    assert (distances.argmin(axis=1) == wanted).mean() < 0.16


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'test'; give one of train, val"):
        demo.draw(1, seed=0, split="test")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return demo.write(tmp_path_factory.mktemp("demo") / "new")


@pytest.mark.parametrize("split", ["train", "val"])
def test_written_files_hold_what_was_drawn(written: tuple[Path, Path], split: str) -> None:
    path = written[["train", "val"].index(split)]
    assert path.name == f"{split}.beton"
    images, labels = demo.draw(demo.COUNTS[split], seed=0, split=split)
    with beton.Reader(path) as reader:
        assert reader.labels is not None
        assert np.array_equal(reader.labels, labels)
        assert reader.class_names == list(demo.CLASS_NAMES)
        assert set(reader.modes) == {beton.JPEG}
        for index in range(0, len(reader), 97):
            decoded = simplejpeg.decode_jpeg(reader.payload(index))
            assert np.abs(decoded.astype(int) - images[index]).mean() < 8  # JPEG of quality 90 costs up to 5 levels
    assert json.loads(beton.sidecar_path(path).read_text(encoding="utf-8"))["samples"] == demo.COUNTS[split]


def test_demo_set_is_large_enough() -> None:
    assert demo.COUNTS["train"] >= 4000
    assert demo.COUNTS["val"] >= 1000


def test_write_twice_is_refused_unless_overwrite(
    written: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(beton.BetonError, match="exists"):
        demo.write(written[0].parent)
    monkeypatch.setattr(demo, "COUNTS", {"train": 20, "val": 10})
    demo.write(tmp_path, seed=1)
    before = (tmp_path / "train.beton").read_bytes()
    demo.write(tmp_path, seed=2, overwrite=True)
    assert (tmp_path / "train.beton").read_bytes() != before
    demo.write(tmp_path, seed=1, overwrite=True)
    assert (tmp_path / "train.beton").read_bytes() == before
