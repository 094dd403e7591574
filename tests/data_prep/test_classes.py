"""Laws of classes from folders: one reading is taken, two are both named, and no image is lost in silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastbyol.data_prep.sources import open_source
from fastbyol.data_prep.sources.base import SourceError
from fastbyol.data_prep.sources.classes import BESIDE, Labels
from tests.support.layouts import contents, draw, lay_out, pack

TREES: dict[str, tuple[list[str], dict[Labels, list[str] | None]]] = {
    "flat": (["1.jpg", "2.jpg"], {"auto": None, "none": None}),
    "class folders": (["a/1.jpg", "b/2.jpg"], {"auto": ["a", "b"], "parent": ["a", "b"], "none": None}),
    "deeper images": (
        ["a/1.jpg", "a/session/2.jpg", "b/3.jpg"],
        {"auto": ["a", "b"], "top": ["a", "b"], "parent": ["a", "a/session", "b"], "none": None},
    ),
    "Tiny-ImageNet": (["n1/images/1.jpg", "n2/images/2.jpg"], {"auto": ["n1", "n2"], "none": None}),
    "two levels": (
        ["a/airfield/1.jpg", "a/alley/2.jpg", "b/bank/3.jpg"],
        {"top": ["a", "b"], "parent": ["a/airfield", "a/alley", "b/bank"], "none": None},
    ),
    "splits": (["train/1.jpg", "val/2.jpg"], {"top": ["train", "val"], "none": None}),
    "beside": (["1.jpg", "a/2.jpg", "b/3.jpg"], {"top": ["a", "b"], "parent": ["a", "b"], "none": None}),
}
CASES = [(tree, labels) for tree, (_, expected) in TREES.items() for labels in expected]


@pytest.mark.parametrize(("tree", "labels"), CASES)
@pytest.mark.parametrize("is_packed", [False, True], ids=["folder", "tar"])
def test_a_tree_has_the_classes_of_its_reading(tmp_path: Path, tree: str, labels: Labels, is_packed: bool) -> None:
    names, expected = TREES[tree]
    files = {name: name.encode() for name in names}
    path = pack(tmp_path / "t.tar", files) if is_packed else lay_out(tmp_path / "t", files)
    source = open_source(path, labels=labels)
    assert source.class_names == expected[labels]
    found = contents(source)
    in_no_class = [name for name in names if "/" not in name] if expected[labels] and tree == "beside" else []
    assert [name for name, _, _ in found] == [name for name in names if name not in in_no_class]
    assert [data.decode() for _, _, data in found] == [name for name, _, _ in found]
    assert source.count == len(found)
    assert source.ignored == ({BESIDE: 1} if in_no_class else {})
    for name, label, _ in found:
        assert label is None or name.startswith((expected[labels] or [])[label])


@pytest.mark.parametrize("is_packed", [False, True], ids=["folder", "tar"])
@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        (
            "two levels",
            [r"--labels top for 2 classes \(a and b\)", r"--labels parent for 3 classes \(a/airfield to b/bank"],
        ),
        ("splits", ["train and val look like parts", r"--labels top for 2 classes \(train and val\)"]),
        (
            "beside",
            ["1 images lie beside folders", r"--labels top for 2 classes \(a and b\), of the 2 images in folders"],
        ),
    ],
)
def test_two_readings_are_both_named_with_their_flags(
    tmp_path: Path, tree: str, expected: list[str], is_packed: bool
) -> None:
    files = dict.fromkeys(TREES[tree][0], b"x")
    path = pack(tmp_path / "t.tar", files) if is_packed else lay_out(tmp_path / "t", files)
    for text in [*expected, "--labels none for all . images without labels"]:
        with pytest.raises(SourceError, match=text):
            open_source(path)


def test_one_folder_above_the_classes_is_named(tmp_path: Path) -> None:
    lay_out(tmp_path, {"data/cat/1.jpg": b"", "data/dog/2.jpg": b""})
    with pytest.raises(SourceError, match=rf"--labels parent for 2 classes .*, or {tmp_path}/data for what lies in it"):
        open_source(tmp_path)


def test_a_class_without_images_keeps_its_number(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    source = open_source(lay_out(tmp_path, {"a/1.jpg": b"", "c/2.jpg": b"", "c/readme.md": b""}))
    assert (source.class_names, source.class_counts) == (["a", "b", "c"], [1, 0, 1])
    assert [label for _, label, _ in contents(source)] == [0, 2]
    assert source.ignored == {".md": 1}


def test_links_in_a_circle_are_named(tmp_path: Path) -> None:
    lay_out(tmp_path, {"a/1.jpg": b""})
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    with pytest.raises(SourceError, match=r"a/again: a link to a folder above it; remove it"):
        open_source(tmp_path)


@pytest.mark.parametrize("is_packed", [False, True], ids=["folder", "tar"])
def test_an_image_without_a_suffix_is_known_by_its_first_bytes(tmp_path: Path, is_packed: bool) -> None:
    files = {"a/1f3a": draw(1), "a/2b": draw(2, kind="PNG"), "b/notes": b"no image", "b/3": draw(3, kind="WEBP")}
    path = pack(tmp_path / "t.tar", files) if is_packed else lay_out(tmp_path / "t", files)
    source = open_source(path)
    assert [(name, label) for name, label, _ in contents(source)] == [("a/1f3a", 0), ("a/2b", 0), ("b/3", 1)]
    assert source.ignored == {"without a suffix": 1}


def test_folders_are_no_labels_of_other_sources(tmp_path: Path) -> None:
    shard = pack(tmp_path / "s.tar", {"1.jpg": b"", "1.cls": b"0"})
    with pytest.raises(SourceError, match="--labels parent is given, which WebDataset shards has no use for"):
        open_source(shard, labels="parent")
    with pytest.raises(SourceError, match="--labels top is given, but no folder in it holds images"):
        open_source(lay_out(tmp_path / "flat", {"1.jpg": b""}), labels="top")
