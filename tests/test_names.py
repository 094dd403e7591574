"""Laws of the names file: every sample's path and content beside the .beton, whatever the names hold, or none."""

from __future__ import annotations

import gzip
import os
import subprocess
from pathlib import Path

import pytest

from fastbyol.beton import Reader
from fastbyol.data_prep.cli import main
from fastbyol.names import hash_content, names_path, read_names
from tests.conftest import Betons
from tests.support.layouts import draw, lay_out

ODD = {  # and what the file holds of it
    "a/plain.png": "a/plain.png",
    "a/tab\t.png": "a/tab\\t.png",
    "a/line\nend.png": "a/line\\nend.png",
    "a/back\\slash.png": "a/back\\\\slash.png",
    os.fsdecode(b"b/\xb9\xb7.png"): "b/\\xb9\\xb7.png",
    "b/\u72d7.png": "b/\u72d7.png",
}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    lay_out(tmp_path / "in", {name: draw(number, kind="PNG") for number, name in enumerate(ODD)})
    assert main(["write", str(tmp_path / "in"), str(tmp_path / "o.beton")]) == 0
    return tmp_path / "o.beton"


def test_every_sample_keeps_its_path_and_content(written: Path) -> None:
    with Reader(written) as reader:
        names = reader.names()
        assert names is not None
        assert sorted(names) == sorted(ODD.values())
        named = read_names(written)
        assert named is not None
        payloads = [reader.payload(index) for index in range(len(reader))]
        assert [content for _, content in named] == list(map(hash_content, payloads))
        assert reader.describe(names.index("a/plain.png")).endswith("(a/plain.png, class a)")


def test_the_file_is_text_of_a_line_a_sample_and_always_the_same_bytes(written: Path, tmp_path: Path) -> None:
    shown = subprocess.run(["zcat", names_path(written)], check=True, capture_output=True, text=True).stdout
    lines = shown.splitlines()
    assert len(lines) == len(ODD)
    assert all(len(line.split("\t")) == 2 for line in lines)
    assert main(["write", str(tmp_path / "in"), str(tmp_path / "p.beton"), "--workers", "1"]) == 0
    assert names_path(tmp_path / "p.beton").read_bytes() == names_path(written).read_bytes()


@pytest.mark.parametrize("fault", ["missing", "cut", "no gzip", "of other images", "one less", "no text", "no columns"])
def test_names_that_are_not_of_these_images_are_none(written: Path, betons: Betons, fault: str) -> None:
    path = names_path(written)
    data = path.read_bytes()
    lines = gzip.decompress(data).splitlines(keepends=True)
    if fault == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {
                "cut": data[: len(data) // 2],
                "no gzip": b"Dear Sir or Madam",
                "of other images": gzip.compress(b"".join(b"x\t0123456789abcdef\n" for _ in lines)),
                "one less": gzip.compress(b"".join(lines[1:])),
                "no text": gzip.compress(b"\xff\xfe\t0\n" * len(lines)),
                "no columns": gzip.compress(b"name\n" * len(lines)),
            }[fault]
        )
    with Reader(written) as reader:
        assert reader.names() is None
        assert reader.describe(0) == "sample 0 (class a)"
    with Reader(betons.unlabelled) as reader:
        assert reader.describe(3) == "sample 3"


def test_a_file_written_over_it_without_names_leaves_none(tmp_path: Path) -> None:
    (tmp_path / "train.beton.names.gz").write_bytes(b"old")
    (tmp_path / "train.beton").write_bytes(b"old")
    assert main(["demo", str(tmp_path), "--overwrite"]) == 0
    assert not (tmp_path / "train.beton.names.gz").exists()
