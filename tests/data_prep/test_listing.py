"""Laws of lists: files and labels in the order of a .txt or .csv, labels for another source, clear errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastbyol.beton import Reader
from fastbyol.data_prep.cli import main
from fastbyol.data_prep.sources import open_source
from fastbyol.data_prep.sources.base import SourceError
from fastbyol.data_prep.sources.listing import ListedLabels
from tests.support.layouts import contents, draw, lay_out, pack

FILES = {"x/1.jpg": b"1", "x/2.jpg": b"2", "y/a b.jpg": b"3"}
LISTS = {
    "l.txt": ("x/2.jpg\nx/1.jpg\n\ny/a b.jpg\n", None, [None, None, None]),
    "labels.txt": ("x/2.jpg 1\nx/1.jpg 0\ny/a b.jpg 1\n", ["0", "1"], [1, 0, 1]),
    "tabs.txt": ("x/2.jpg\tcat\r\nx/1.jpg\tdog\r\ny/a b.jpg\tcat\r\n", ["cat", "dog"], [0, 1, 0]),
    "l.csv": ("path\nx/2.jpg\nx/1.jpg\ny/a b.jpg\n", None, [None, None, None]),
    "labels.csv": ('label,file_name\ncat,x/2.jpg\ndog,x/1.jpg\ncat,"y/a b.jpg"\n', ["cat", "dog"], [0, 1, 0]),
    "bom.csv": ("\ufefffilename,class\nx/2.jpg,1\nx/1.jpg,0\ny/a b.jpg,1\n", ["0", "1"], [1, 0, 1]),
    "l.tsv": ("image\ttarget\nx/2.jpg\t1\nx/1.jpg\t0\ny/a b.jpg\t1\n", ["0", "1"], [1, 0, 1]),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_is_read_in_its_order(tmp_path: Path, name: str) -> None:
    text, names, labels = LISTS[name]
    lay_out(tmp_path, FILES | {name: text.encode()})
    source = open_source(tmp_path / name)
    expected = list(zip(["x/2.jpg", "x/1.jpg", "y/a b.jpg"], labels, [b"2", b"1", b"3"], strict=True))
    assert (source.class_names, source.count, contents(source)) == (names, 3, expected)
    assert open_source(tmp_path / name, labels="none").class_names is None


def test_the_column_of_labels_is_chosen(tmp_path: Path) -> None:
    lay_out(tmp_path, FILES | {"l.csv": b"path,label,fine\nx/1.jpg,0,7\nx/2.jpg,0,8\n"})
    source = open_source(tmp_path / "l.csv", label_column="fine")
    assert [label for _, label, _ in contents(source)] == [7, 8]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("l.txt", "", "an empty list"),
        ("l.txt", "x/1.jpg\nx/9.jpg\n", r"x/9\.jpg does not exist; paths are relative to"),
        ("l.csv", "a,b\n1,2\n", "columns are a, b; name that of the files 'path'"),
        ("l.csv", "path,label\nx/1.jpg,-3\n", "label of x/1.jpg is -3"),
        ("l.txt", "x" * 70_000, "a line of 70000 characters"),
    ],
)
def test_a_list_that_cannot_be_used_is_told(tmp_path: Path, name: str, text: str, expected: str) -> None:
    lay_out(tmp_path, FILES | {name: text.encode()})
    with pytest.raises(SourceError, match=expected):
        open_source(tmp_path / name)


def test_a_column_that_is_not_there_is_told(tmp_path: Path) -> None:
    lay_out(tmp_path, FILES | {"l.csv": b"path,label\nx/1.jpg,0\n"})
    with pytest.raises(SourceError, match="no column 'fine'; give one of path, label"):
        open_source(tmp_path / "l.csv", label_column="fine")


@pytest.mark.parametrize("is_packed", [False, True], ids=["folder", "tar"])
def test_a_list_labels_a_flat_set_as_imagenets_validation(tmp_path: Path, is_packed: bool) -> None:
    files = {f"ILSVRC2012_val_{number:08}.JPEG": b"%d" % number for number in range(1, 4)}
    source = open_source(pack(tmp_path / "v.tar", files) if is_packed else lay_out(tmp_path / "val", files))
    (tmp_path / "l.txt").write_text("".join(f"{name} {number % 2}\n" for number, name in enumerate(files)))
    listed = ListedLabels(source, tmp_path / "l.txt")
    assert contents(listed) == [(name, number % 2, data) for number, (name, data) in enumerate(files.items())]
    (tmp_path / "less.txt").write_text("ILSVRC2012_val_00000001 0\nILSVRC2012_val_00000002 1\n")
    with pytest.raises(SourceError, match=r"has no line for ILSVRC2012_val_00000003\.JPEG"):
        ListedLabels(source, tmp_path / "less.txt")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1.jpg 0\n1.jpg 1\n", r"1\.jpg has two labels; remove one"),
        ("1.jpg 0\nb/1.jpg 1\n", r"has no line for a/1\.jpg"),
        ("a/1.jpg\n", "has no labels; wanted NAME LABEL a line"),
        ("\0a\0/\0", "not a list in UTF-8"),
    ],
)
def test_labels_that_are_not_clear_are_told(tmp_path: Path, text: str, expected: str) -> None:
    source = open_source(lay_out(tmp_path / "in", {"a/1.jpg": b"x"}), labels="none")
    (tmp_path / "l.txt").write_text(text)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").touch()
    with pytest.raises(SourceError, match=expected):
        ListedLabels(source, tmp_path / "l.txt")


def test_the_command_takes_lists_and_labels_and_notices_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lay_out(tmp_path, {f"in/{number}.jpg": draw(number) for number in range(4)})
    (tmp_path / "l.txt").write_text("".join(f"in/{number}.jpg {number % 2}\n" for number in range(4)))
    (tmp_path / "cache").mkdir()
    write = ["write", str(tmp_path / "l.txt"), str(tmp_path / "cache")]
    for said in ("4 images, 2 classes (0 and 1)", "unchanged since it was written"):
        assert main(write) == 0
        assert said in capsys.readouterr().out
    (tmp_path / "in" / "3.jpg").write_bytes(draw(9))
    assert main(write) == 0
    assert "4 images, 2 classes" in capsys.readouterr().out
    labelled = ["write", str(tmp_path / "in"), str(tmp_path / "p.beton"), "--labels-from", str(tmp_path / "l.txt")]
    assert main(labelled) == 0
    with Reader(tmp_path / "p.beton") as reader:
        assert reader.labels is not None
        assert reader.labels.tolist() == [0, 1, 0, 1]
