"""Laws of the sources: the same samples in the same order from folders and archives; nothing outside is ever read."""

from __future__ import annotations

import io
import tarfile
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import pytest

from fastbyol.data_prep.sources import Sample, SourceError, TarSource, open_source

FILES = {
    "cat/b.JPEG": b"cat b",
    "cat/a.jpg": b"cat a",
    "dog/x.png": b"dog x",
    "ant/1.webp": b"ant 1",
    "ant/10.webp": b"ant 10",
    "ant/2.webp": b"ant 2",
}
NOISE = {"readme.txt": b"", "cat/notes.md": b"", ".hidden/y.jpg": b"", "dog/.x.jpg": b"", "empty/readme": b""}


def lay_out(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def pack(path: Path, files: dict[str, bytes], extra: Iterable[tarfile.TarInfo] = (), mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member in extra:
            archive.addfile(member)
    return path


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def contents(samples: Iterable[Sample]) -> list[tuple[str, int | None, bytes]]:
    return [(sample.name, sample.label, sample.read()) for sample in samples]


def test_class_folders_are_sorted_and_labelled(tmp_path: Path) -> None:
    source = open_source(lay_out(tmp_path, FILES | NOISE))
    assert source.class_names == ["ant", "cat", "dog"]
    assert contents(source) == [
        ("ant/1.webp", 0, b"ant 1"),
        ("ant/10.webp", 0, b"ant 10"),
        ("ant/2.webp", 0, b"ant 2"),
        ("cat/a.jpg", 1, b"cat a"),
        ("cat/b.JPEG", 1, b"cat b"),
        ("dog/x.png", 2, b"dog x"),
    ]
    assert (source.count, source.ignored) == (6, 3)
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
    assert source.class_names == folder.class_names
    assert source.count == folder.count
    expected = {(label, data) for _, label, data in contents(folder)}
    assert {(label, data) for _, label, data in contents(source)} == expected
    in_archive = [data for name, data in files.items() if data]
    assert [data for _, _, data in contents(source)] == in_archive, "an archive is streamed in its own order"


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
    assert source.ignored == 4


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_cut_archive_is_named(tmp_path: Path, mode: str) -> None:
    whole = pack(tmp_path / "a.tar", {f"cat/{i}.jpg": bytes([i]) * 3000 for i in range(20)}, mode=mode).read_bytes()
    for size in (len(whole) // 3, len(whole) // 2):
        (tmp_path / "cut.tar").write_bytes(whole[:size])
        with pytest.raises(SourceError, match=r"cut\.tar"):
            contents(open_source(tmp_path / "cut.tar"))


def test_archive_is_streamed(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", {f"{i % 2}/{i}.jpg": b"x" * 20_000 for i in range(3000)})
    tracemalloc.start()
    assert sum(len(sample.read()) for sample in TarSource(path)) == 60_000_000
    # Up to 1.4 MB, the same at 1000 and 12 000 members, belongs to Python's own caches.
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no images.*known suffixes"),
        ({"a.txt": b""}, "no images"),
        ({"train/cat/a.jpg": b"", "val/cat/b.jpg": b""}, "give .*/train instead"),
        ({"cat/a.jpg": b"", "b.jpg": b""}, "beside class folders such as cat"),
    ],
    ids=["empty", "no images", "splits", "mixed"],
)
def test_unusable_folder_says_what_to_pass(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        open_source(lay_out(tmp_path, files))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"a\.tar: "),  # Python 3.10 cannot read an archive of nothing
        ({"readme.txt": b""}, "no images"),
        ({"train/cat/a.jpg": b"", "val/cat/b.jpg": b""}, "train/cat and val/cat"),
        ({"cat/a.jpg": b"", "b.jpg": b""}, "different parents"),
        ({"x/cat/a.jpg": b"", "x/y/dog/b.jpg": b""}, "different parents"),
    ],
    ids=["empty", "no images", "splits", "mixed", "depths"],
)
def test_unusable_archive_says_what_to_pass(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        open_source(pack(tmp_path / "a.tar", files))


def test_what_is_no_source_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK not a tar")
    for name, message in {"a.zip": "neither a folder nor a tar", "nowhere": "no such file or folder"}.items():
        with pytest.raises(SourceError, match=message):
            open_source(tmp_path / name)
