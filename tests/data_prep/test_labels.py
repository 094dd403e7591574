"""Laws of the label map: the same class has the same number in every file written with --classes-from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastbyol.beton import Reader
from fastbyol.data_prep.cli import main
from fastbyol.data_prep.sources import open_source
from fastbyol.data_prep.sources.base import SourceError
from fastbyol.data_prep.sources.labels import RelabelledSource, read_class_names
from tests.support.layouts import contents, draw, lay_out

TRAIN = {"ant/1.jpg": draw(1), "bee/2.jpg": draw(2), "cat/3.jpg": draw(3), "dog/4.jpg": draw(4)}
VAL = {"bee/5.jpg": draw(5), "dog/6.jpg": draw(6), "dog/7.jpg": draw(7)}


@pytest.fixture
def train(tmp_path: Path) -> Path:
    lay_out(tmp_path / "train", TRAIN)
    assert main(["write", str(tmp_path / "train"), str(tmp_path / "train.beton")]) == 0
    return tmp_path / "train.beton"


@pytest.mark.parametrize("origin", ["train.beton", "train.beton.json", "names.json"])
def test_validation_without_some_classes_keeps_the_numbers(tmp_path: Path, train: Path, origin: str) -> None:
    (tmp_path / "names.json").write_text(json.dumps(["ant", "bee", "cat", "dog"]))
    lay_out(tmp_path / "val", VAL)
    out = tmp_path / "val.beton"
    assert main(["write", str(tmp_path / "val"), str(out), "--classes-from", str(train.parent / origin)]) == 0
    with Reader(out) as reader:
        assert reader.labels is not None
        assert reader.labels.tolist() == [1, 3, 3]
        assert reader.class_names == ["ant", "bee", "cat", "dog"]


def test_an_unknown_class_is_named(tmp_path: Path, train: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lay_out(tmp_path / "val", VAL | {"eel/8.jpg": draw(8), "fox/9.jpg": draw(9)})
    arguments = ["write", str(tmp_path / "val"), str(tmp_path / "val.beton"), "--classes-from", str(train)]
    assert main(arguments) == 2
    assert "class 'eel' and 1 more are not in" in capsys.readouterr().err
    assert not (tmp_path / "val.beton").exists()


def test_order_of_the_other_file_rules(tmp_path: Path) -> None:
    source = RelabelledSource(open_source(lay_out(tmp_path, VAL)), ["dog", "ant", "bee"], origin=Path("o.json"))
    assert (source.class_names, source.class_counts, source.count) == (["dog", "ant", "bee"], [2, 0, 1], 3)
    assert [label for _, label, _ in contents(source)] == [2, 0, 0]


def test_unlabelled_images_have_no_classes(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="its images have no labels, to be numbered as in"):
        RelabelledSource(open_source(lay_out(tmp_path, {"1.jpg": b"1"})), ["a"], origin=Path("o.json"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "no class names"),
        ("3", "no class names"),
        ('["a", 3]', "no class names"),
        ('{"class_names": null}', "no class names"),
        ('["a", "b", "a"]', "two classes are named 'a'"),
    ],
)
def test_what_holds_no_class_names_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "o.json").write_text(text)
    with pytest.raises(SourceError, match=message):
        read_class_names(tmp_path / "o.json")


def test_an_unlabelled_beton_holds_no_class_names(tmp_path: Path) -> None:
    lay_out(tmp_path / "flat", {"1.jpg": draw(1)})
    assert main(["write", str(tmp_path / "flat"), str(tmp_path / "a.beton")]) == 0
    with pytest.raises(SourceError, match="no class names"):
        read_class_names(tmp_path / "a.beton")
    with pytest.raises(SourceError, match="cannot be opened"):
        read_class_names(tmp_path / "b.beton")
