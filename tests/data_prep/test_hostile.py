"""Laws of hostile archives: no header's claim is believed; one line says what is wrong, and memory stays flat."""

from __future__ import annotations

import gzip
import struct
import tarfile
import tracemalloc
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest

from fastbyol.data_prep.sources import open_source
from fastbyol.data_prep.sources.base import SourceError
from tests.support.layouts import packed

GIB = 1 << 30
END = bytes(1024)
PEAK_BYTES = 8 << 20
GOOD = {"cat/a.jpg": b"cat a", "dog/b.jpg": b"dog b"}


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, patch: dict[int, bytes] | None = None) -> bytes:
    """Make a member's header as GNU tar does, then change bytes of it, and sum it up anew."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT)[-512:])
    for place, value in (patch or {}).items():
        block[place : place + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(records: dict[str, str], kind: bytes = tarfile.XHDTYPE, *, size: int | None = None) -> bytes:
    """Make a pax header of any length, or one that claims another length than it has."""
    text = b""
    for key, value in records.items():
        record = f" {key}={value}\n".encode()
        length = len(record) + 1
        while length != len(record) + len(str(length)):
            length += 1
        text += str(length).encode() + record
    return header("pax", len(text) if size is None else size, kind) + text + bytes(-len(text) % 512)


def member(name: str, data: bytes, claimed: int | None = None) -> bytes:
    """Make a member that claims to have so many bytes."""
    return header(name, len(data) if claimed is None else claimed) + data + bytes(-len(data) % 512)


def old_sparse(name: str) -> bytes:
    """Make a GNU sparse member of one block that becomes 8 GiB."""
    octal = b"%011o\0"
    map_ = octal % (8 * GIB - 512) + octal % 512
    return header(name, 512, tarfile.GNUTYPE_SPARSE, {386: map_, 483: octal % (8 * GIB - 1)}) + bytes(512)


def new_sparse(name: str, records: dict[str, str], data: bytes) -> bytes:
    """Make a pax sparse member."""
    return pax({"GNU.sparse.name": name, "GNU.sparse.realsize": str(8 * GIB)} | records) + member(name, data)


SPARSE_1 = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
NEGATIVE = {124: b"\xff" * 12}  # a size of -1, in base 256
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "old sparse image": (lambda: old_sparse("cat/c.jpg"), "'cat/c.jpg' is sparse; pack it again, without --sparse"),
    "old sparse note": (lambda: old_sparse("cat/note"), "'cat/note' is sparse"),
    "sparse 0.0": (
        lambda: new_sparse("cat/c.jpg", {"GNU.sparse.size": str(8 * GIB), "GNU.sparse.numblocks": "0"}, b""),
        "'cat/c.jpg' is sparse",
    ),
    "sparse 0.1": (lambda: new_sparse("cat/c.jpg", {"GNU.sparse.map": "0,1"}, b"x"), "'cat/c.jpg' is sparse"),
    "sparse 0.1 without numbers": (lambda: new_sparse("c.jpg", {"GNU.sparse.map": "a,b"}, b"x"), "damaged"),
    "sparse 1.0": (lambda: new_sparse("cat/c.jpg", SPARSE_1, b"1\n0\n1\n".ljust(512, b"\0")), "'cat/c.jpg' is sparse"),
    "sparse 1.0 with an endless map": (
        lambda: new_sparse("cat/c.jpg", SPARSE_1, b"999999999\n" + b"0\n" * (1 << 24)),
        "'cat/c.jpg' is sparse",
    ),
    "long pax header": (
        lambda: pax({"comment": "x" * (1 << 25)}) + member("cat/c.jpg", b"c"),
        "has a header of 3355",
    ),
    "pax header that claims gigabytes": (lambda: pax({}, size=8 * GIB - 1), "has a header of 8589934591 bytes"),
    "Solaris's pax header": (
        lambda: pax({}, tarfile.SOLARIS_XHDTYPE, size=4 * GIB),
        "header of 4294967296 bytes",
    ),
    "long name that claims gigabytes": (
        lambda: header("x", 8 * GIB - 1, tarfile.GNUTYPE_LONGNAME),
        "has a header of 8589934591 bytes",
    ),
    "pax header after pax header": (lambda: pax({"a": "b"}) * 3000 + member("cat/c.jpg", b"c"), "damaged"),
    "many global headers": (
        lambda: b"".join(
            pax({f"key{n}": "x" * (1 << 17)}, tarfile.XGLTYPE) + member(f"cat/{n}.jpg", b"c") for n in range(100)
        ),
        "bytes of global headers",
    ),
    "pax number of many digits": (lambda: pax({"size": "9" * 5000}) + member("cat/c.jpg", b"c"), "damaged"),
    "image that claims gigabytes": (lambda: member("cat/c.jpg", b"c", 8 * GIB - 1), "has 8589934591 bytes"),
    "image that claims to be large": (lambda: member("cat/c.jpg", b"c", 200 << 20), "damaged or cut short"),
    "note that claims gigabytes": (lambda: member("cat/note", b"c", 8 * GIB - 1), "damaged or cut short"),
    "pax size of gigabytes": (
        lambda: pax({"size": str(99 * GIB)}) + member("cat/c.jpg", b"c"),
        "bytes; an image may have",
    ),
    "negative size": (lambda: header("cat/c.jpg", 0, patch=NEGATIVE), "damaged"),
    "negative pax size": (lambda: pax({"size": "-4096"}) + member("cat/c.jpg", b"c"), "damaged"),
}


@pytest.mark.parametrize("is_first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("is_compressed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_member_is_refused_in_one_line_and_flat_memory(
    tmp_path: Path, case: str, is_compressed: bool, is_first: bool
) -> None:
    make, message = HOSTILE[case]
    good = packed(GOOD)[: 4 * 512]  # two members, without the end mark
    data = (make() + good if is_first else good + make()) + END
    path = tmp_path / "hostile.tar"
    path.write_bytes(gzip.compress(data, 1) if is_compressed else data)
    del data
    tracemalloc.start()
    try:
        with pytest.raises(SourceError) as caught:
            deque(open_source(path), maxlen=1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert peak < PEAK_BYTES


def test_a_hostile_inner_archive_is_refused(tmp_path: Path) -> None:
    for case in ("old sparse image", "pax header that claims gigabytes", "note that claims gigabytes"):
        make, message = HOSTILE[case]
        path = tmp_path / "outer.tar"
        path.write_bytes(packed({"cat.tar": packed({"a.jpg": b"a"}), "dog.tar": make() + END}))
        with pytest.raises(SourceError) as caught:
            list(open_source(path))
        assert message in str(caught.value), case
        assert "\n" not in str(caught.value)


def test_a_long_name_and_a_comment_are_no_fault(tmp_path: Path) -> None:
    name = "cat/" + "x" * 200 + ".jpg"
    data = pax({"comment": "x" * 60_000, "SCHILY.xattr.user.note": "y" * 60_000}) + packed({name: b"c"})
    (tmp_path / "a.tar").write_bytes(data)
    assert [sample.name for sample in open_source(tmp_path / "a.tar")] == [name]


def test_headers_are_laid_out_as_the_standard_library_reads_them(tmp_path: Path) -> None:
    """What the suite builds must be hostile, not broken."""
    path = tmp_path / "a.tar"
    path.write_bytes(old_sparse("a") + new_sparse("b", {"GNU.sparse.map": "0,1"}, b"x") + member("c", b"c") + END)
    with tarfile.open(path) as archive:
        found = [(each.name, each.issparse(), each.size) for each in archive]
    assert found == [("a", True, 8 * GIB - 1), ("b", True, 8 * GIB), ("c", False, 1)]
    assert struct.calcsize("512s") == len(header("x", 1))
