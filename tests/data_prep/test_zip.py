"""Laws of .zip: what a .tar of the same files holds, and no name outside, no damage, no password gets through."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest

from fastbyol.data_prep.sources import open_source
from fastbyol.data_prep.sources.base import SourceError
from fastbyol.data_prep.sources.tar import LINK_OR_HIDDEN
from tests.support.layouts import contents, draw, pack

FILES = {
    "train/cat/b.JPEG": b"cat b",
    "train/dog/x.png": b"dog x",
    "train/cat/a.jpg": b"cat a",
    "train/cat/notes.md": b"",
}


def packed(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_a_zip_holds_what_the_tar_holds(tmp_path: Path, method: int) -> None:
    source = open_source(write(tmp_path / "a.zip", packed(FILES, method)))
    tar = open_source(pack(tmp_path / "a.tar", FILES))
    assert (source.class_names, source.class_counts) == (tar.class_names, tar.class_counts) == (["cat", "dog"], [2, 1])
    assert contents(source) == contents(tar) == contents(source)
    assert source.ignored == tar.ignored == {".md": 1}
    assert open_source(tmp_path / "a.zip", labels="none").class_names is None


def test_a_tar_that_ends_in_a_zip_is_a_tar(tmp_path: Path) -> None:
    files = {"cat/1.jpg": b"a", "dog/2.jpg": b"b", "extra.zip": packed({"other/3.jpg": b"c"})}
    source = open_source(pack(tmp_path / "a.tar", files))
    assert [name for name, _, _ in contents(source)] == ["cat/1.jpg", "dog/2.jpg"]


def test_what_macos_adds_is_passed_over_and_content_decides(tmp_path: Path) -> None:
    files = {"p/1": draw(1), "p/2.jpg": draw(2), "__MACOSX/p/._2.jpg": b"x", "p/.DS_Store": b"x", "p/readme": b"x"}
    source = open_source(write(tmp_path / "a.zip", packed(files)))
    assert [name for name, _, _ in contents(source)] == ["p/1", "p/2.jpg"]
    assert source.ignored == {LINK_OR_HIDDEN: 2, "without a suffix": 1}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"../x.jpg": b""}, "points outside"),
        ({"/etc/x.jpg": b""}, "points outside"),
        ({"readme.txt": b""}, "no images"),
        ({"a/1.jpg": b"", "2.jpg": b""}, "1 images lie beside folders of images such as a"),
    ],
)
def test_unusable_archives_are_told(tmp_path: Path, files: dict[str, bytes], expected: str) -> None:
    with pytest.raises(SourceError, match=expected):
        open_source(write(tmp_path / "a.zip", packed(files)))


def test_damage_and_encryption_are_told(tmp_path: Path) -> None:
    data = bytearray(packed({f"{n}.jpg": bytes([n]) * 3000 for n in range(5)}, zipfile.ZIP_STORED))
    data[200] ^= 1
    with pytest.raises(SourceError, match=r"a\.zip: damaged, cut short, or of another kind: Bad CRC-32"):
        contents(open_source(write(tmp_path / "a.zip", bytes(data))))
    secret = bytearray(packed({"1.jpg": b"x"}))
    secret[secret.index(b"PK\1\2") + 8] |= 1
    with pytest.raises(SourceError, match=r"1\.jpg is encrypted; pack it again without a password"):
        open_source(write(tmp_path / "b.zip", bytes(secret)))
    with pytest.raises(SourceError, match=r"cut\.zip: neither a folder"):
        open_source(write(tmp_path / "cut.zip", bytes(data[:-30])))
