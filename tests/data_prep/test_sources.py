"""Laws of the sources: the same samples in the same order from folders and archives; nothing outside is ever read."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from fastbyol.data_prep.convert import convert
from fastbyol.data_prep.settings import Settings
from fastbyol.data_prep.sources import open_source
from fastbyol.data_prep.sources.base import SourceError
from fastbyol.data_prep.sources.tar import LINK_OR_HIDDEN
from tests.support.layouts import contents, lay_out, link, pack

ROOT = Path(__file__).parents[2]
FILES = {
    "cat/b.JPEG": b"cat b",
    "cat/a.jpg": b"cat a",
    "dog/x.png": b"dog x",
    "ant/1.webp": b"ant 1",
    "ant/10.webp": b"ant 10",
    "ant/2.webp": b"ant 2",
}
NOISE = {"readme.txt": b"", "cat/notes.md": b"", ".hidden/y.jpg": b"", "dog/.x.jpg": b"", "empty/readme": b""}


def test_class_folders_are_sorted_and_labelled(tmp_path: Path) -> None:
    source = open_source(lay_out(tmp_path, FILES | NOISE))
    assert source.class_names == ["ant", "cat", "dog", "empty"]
    assert contents(source) == [
        ("ant/1.webp", 0, b"ant 1"),
        ("ant/10.webp", 0, b"ant 10"),
        ("ant/2.webp", 0, b"ant 2"),
        ("cat/a.jpg", 1, b"cat a"),
        ("cat/b.JPEG", 1, b"cat b"),
        ("dog/x.png", 2, b"dog x"),
    ]
    assert (source.count, source.ignored) == (6, {".txt": 1, ".md": 1, "without a suffix": 1})
    assert source.class_counts == [3, 2, 1, 0]
    assert contents(source) == contents(source)


def test_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    source = open_source(lay_out(tmp_path, {"b.jpg": b"b", "a.PNG": b"a", "readme": b""}))
    assert source.class_names is None
    assert contents(source) == [("a.PNG", None, b"a"), ("b.jpg", None, b"b")]


def test_folders_may_be_made_of_links(tmp_path: Path) -> None:
    lay_out(tmp_path / "real", FILES)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/cat").symlink_to(tmp_path / "real/cat")
    (tmp_path / "linked/dog").mkdir()
    (tmp_path / "linked/dog/z.png").symlink_to(tmp_path / "real/dog/x.png")
    assert contents(open_source(tmp_path / "linked")) == [
        ("cat/a.jpg", 0, b"cat a"),
        ("cat/b.JPEG", 0, b"cat b"),
        ("dog/z.png", 1, b"dog x"),
    ]


@pytest.mark.parametrize("prefix", ["", "./", "train/", "./data/2012/train/"])
@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_tar_holds_what_the_folder_holds(tmp_path: Path, prefix: str, mode: str) -> None:
    files = {prefix + name: content for name, content in (FILES | {"cat/notes.md": b"", "cat/._a.jpg": b""}).items()}
    source = open_source(pack(tmp_path / "a.tar", files, mode=mode))
    folder = open_source(lay_out(tmp_path / "folder", FILES))
    assert (source.class_names, source.class_counts) == (folder.class_names, folder.class_counts)
    assert source.count == folder.count
    expected = {(label, data) for _, label, data in contents(folder)}
    assert {(label, data) for _, label, data in contents(source)} == expected
    in_archive = [data for name, data in files.items() if data]
    assert [data for _, _, data in contents(source)] == in_archive, "an archive is streamed in its own order"


def test_files_of_another_folder_are_passed_over_and_large_ones_not_read(tmp_path: Path) -> None:
    files = {"data/cat/1.jpg": b"a", "data/dog/2.jpg": b"b", "README": b"", "LICENSE/x": b"no image"}
    source = open_source(pack(tmp_path / "a.tar", files))
    assert contents(source) == [("data/cat/1.jpg", 0, b"a"), ("data/dog/2.jpg", 1, b"b")]
    assert source.ignored == {"without a suffix": 2}


def test_flat_tar_is_unlabelled(tmp_path: Path) -> None:
    source = open_source(pack(tmp_path / "a.tar", {"images/b.jpg": b"b", "images/a.jpg": b"a"}))
    assert source.class_names is None
    assert contents(source) == [("images/b.jpg", None, b"b"), ("images/a.jpg", None, b"a")]


@pytest.mark.parametrize("name", ["../x.jpg", "cat/../../x.jpg", "/etc/x.jpg"])
def test_archive_member_outside_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SourceError, match="points outside"):
        open_source(pack(tmp_path / "a.tar", FILES | {name: b"x"}))


def test_archive_links_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    links = [link("cat/s.jpg", str(secret), tarfile.SYMTYPE), link("cat/h.jpg", str(secret), tarfile.LNKTYPE)]
    links += [link("cat/up.jpg", "../../secret.jpg", tarfile.SYMTYPE), link("cat/f.jpg", "", tarfile.FIFOTYPE)]
    source = open_source(pack(tmp_path / "a.tar", FILES, links))
    assert [data for _, _, data in contents(source)] == list(FILES.values())
    assert source.ignored == {LINK_OR_HIDDEN: 4}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_cut_archive_is_named(tmp_path: Path, mode: str) -> None:
    whole = pack(tmp_path / "a.tar", {f"cat/{i}.jpg": bytes([i]) * 3000 for i in range(20)}, mode=mode).read_bytes()
    for size in (len(whole) // 3, len(whole) // 2):
        (tmp_path / "cut.tar").write_bytes(whole[:size])
        with pytest.raises(SourceError, match=r"cut\.tar"):
            contents(open_source(tmp_path / "cut.tar"))


@pytest.mark.parametrize("cut_at_end", [False, True], ids=["damaged header", "cut"])
def test_no_image_behind_a_damaged_header_is_lost_silently(tmp_path: Path, cut_at_end: bool) -> None:
    whole = pack(tmp_path / "a.tar", {f"{i}.jpg": bytes([i]) * 600 for i in range(4)}).read_bytes()
    member = 512 + 1024
    for number in range(1, 5):
        for place in (number * member, number * member + 148, number * member + 511):
            broken = whole[:place] if cut_at_end else whole[:place] + b"\x80" + whole[place + 1 :]
            (tmp_path / "bad.tar").write_bytes(broken)
            with pytest.raises(SourceError, match=r"bad\.tar: damaged or cut short"):
                open_source(tmp_path / "bad.tar")


def test_joined_archives_and_wrong_checksums_are_refused(tmp_path: Path) -> None:
    first = pack(tmp_path / "1.tar", {"a.jpg": b"a"}).read_bytes()
    (tmp_path / "both.tar").write_bytes(first * 2)
    with pytest.raises(SourceError, match="concatenated archives one by one"):
        open_source(tmp_path / "both.tar")
    (tmp_path / "padded.tar").write_bytes(first + bytes(100_000))
    assert contents(open_source(tmp_path / "padded.tar")) == [("a.jpg", None, b"a")]
    packed = bytearray(pack(tmp_path / "a.tar", {"a.jpg": b"a" * 5000}, mode="w:gz").read_bytes())
    packed[-8] ^= 1
    (tmp_path / "a.tar").write_bytes(packed)
    with pytest.raises(SourceError, match=r"a\.tar: cannot be read: CRC check failed"):
        open_source(tmp_path / "a.tar")


def test_archive_is_streamed(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", {f"{i % 2}/{i}.jpg": b"x" * 20_000 for i in range(3000)})
    code = (  # in a process of its own: Python's table of interned strings doubles by 8 MB late in a test run
        "import sys, tracemalloc; from pathlib import Path; from fastbyol.data_prep.sources.tar import TarSource; "
        "tracemalloc.start(); total = sum(len(sample.read()) for sample in TarSource(Path(sys.argv[1]))); "
        "print(total, tracemalloc.get_traced_memory()[1])"
    )
    said = subprocess.run([sys.executable, "-c", code, path], check=True, capture_output=True, text=True).stdout
    total, peak = map(int, said.split())
    assert total == 60_000_000
    assert peak < 3e6


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no images.*known suffixes"),
        ({"a.txt": b""}, "no images"),
        (
            {"train/cat/a.jpg": b"", "val/cat/b.jpg": b""},
            r"train and val look like parts.*give one of them, as .*/train, or give --labels top",
        ),
        ({"cat/a.jpg": b"", "b.jpg": b""}, "1 images lie beside folders of images such as cat; give --labels top"),
        ({"n01.tar": b"", "n02.tar": b""}, "2 archives such as n01.tar"),
        ({"data/train-0-of-1.parquet": b""}, "give .*/data instead"),
    ],
    ids=["empty", "no images", "splits", "mixed", "archives", "parquet"],
)
def test_unusable_folder_says_what_to_pass(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        open_source(lay_out(tmp_path, files))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"a\.tar: "),  # Python 3.10 cannot read an archive of nothing
        ({"readme.txt": b""}, "no images"),
        ({"train/cat/a.jpg": b"", "val/cat/b.jpg": b""}, "train and val look like parts.*pack each of them"),
        ({"cat/a.jpg": b"", "b.jpg": b""}, "1 images lie beside folders of images such as cat"),
    ],
    ids=["empty", "no images", "splits", "mixed"],
)
def test_unusable_archive_says_what_to_pass(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        open_source(pack(tmp_path / "a.tar", files))


def test_what_is_no_source_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK not a tar")
    for name, message in {"a.zip": "neither a folder, nor a .tar", "nowhere": "no such file or folder"}.items():
        with pytest.raises(SourceError, match=message):
            open_source(tmp_path / name)


def test_an_archive_that_changes_after_listing_is_refused(tmp_path: Path) -> None:
    image = simplejpeg.encode_jpeg(np.zeros((8, 8, 3), np.uint8))
    path = pack(tmp_path / "t.tar", {f"a/{i}.jpg": image for i in range(3)})
    source = open_source(path)
    pack(path, {f"a/{i}.jpg": image for i in range(2)})
    with pytest.raises(SourceError, match="3 images were listed but 2 were read"):
        convert(source, tmp_path / "out.beton", Settings(mode="passthrough"), workers=1)
    assert not (tmp_path / "out.beton").exists()


@pytest.mark.parametrize(
    ("package", "use"),
    [
        ("pyarrow", "from fastbyol.data_prep.sources import open_source; open_source(Path('a.parquet'))"),
        ("pillow_heif", "from fastbyol.data_prep.formats import load_plugin; load_plugin('HEIF')"),
    ],
)
def test_a_package_that_is_there_and_fails_is_not_to_be_installed(package: str, use: str, tmp_path: Path) -> None:
    (tmp_path / f"{package}.py").write_text("raise ImportError('numpy.core.multiarray failed to import')")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    command = [sys.executable, "-c", f"import sys; sys.path[1:1] = [{str(ROOT)!r}]; from pathlib import Path; {use}"]
    ran = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    said = ran.stderr.strip().splitlines()[-1]
    assert f"{package}" in said
    assert "numpy.core.multiarray failed to import" in said
    assert "mend what its import lacks" in said
    assert "pip install" not in said
