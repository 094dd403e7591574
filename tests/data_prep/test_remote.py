"""Laws of sources that lie elsewhere: the bytes of local ones, nothing fetched twice, nothing wrong after a cut."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastbyol.beton import Reader, sidecar_path
from fastbyol.data_prep.cli import main
from fastbyol.names import names_path
from fastbyol.system.command_line import shown
from tests.support.cifar import folder_10
from tests.support.layouts import draw, lay_out, pack
from tests.support.web import Web

fsspec = pytest.importorskip("fsspec", reason="sources elsewhere are read by fsspec: pip install '.[remote]'")
COMMAND = (sys.executable, "-m", "fastbyol.data_prep.cli", "write")
PHOTOS = {f"{'abc'[i % 3]}/{i} x.jpg": draw(i) for i in range(12)} | {"a/deep/er.png": draw(20, kind="PNG")}


@pytest.fixture
def www(tmp_path: Path) -> Path:
    """Lay out a folder of photos, an empty class among them, two shards, a .zip, and what is no part of them."""
    www = lay_out(tmp_path / "www", {f"photos/{name}": content for name, content in PHOTOS.items()})
    lay_out(www, {"photos/notes.md": b"x", "photos/.hidden/h.jpg": draw(1), "photos/a/.h.jpg": draw(1)})
    (www / "photos" / "empty").mkdir()
    for shard in range(2):
        files = {
            f"{shard}{i}.{kind}": draw(i) if kind == "jpg" else b"%d" % i for i in range(3) for kind in ("cls", "jpg")
        }
        pack(www / f"shard-{shard}.tar", files)
    with zipfile.ZipFile(www / "x.zip", "w") as archive:
        for name, content in PHOTOS.items():
            archive.writestr(name, content)
    return www


@pytest.fixture
def web(www: Path) -> Iterator[Web]:
    """Serve them."""
    pytest.importorskip("aiohttp", reason="fsspec reads the web by aiohttp: pip install '.[remote]'")
    with Web(www).serving() as web:
        yield web


@pytest.fixture
def memory(www: Path) -> Iterator[str]:
    """Put them where fsspec keeps files in memory; return the address."""
    system = fsspec.filesystem("memory")
    for path in sorted(www.rglob("*")):
        place = f"/bucket/{path.relative_to(www)}"
        system.pipe(place, path.read_bytes()) if path.is_file() else system.makedirs(place, exist_ok=True)
    yield "memory://bucket"
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def write(source: object, out: Path, *more: str) -> int:
    return main(["write", str(source), str(out), *more])


def assert_same(out: Path, local: Path, *, address: str) -> None:
    """Check that both files are the same, but for the place in the sidecar, and that nothing else lies beside them."""
    assert out.read_bytes() == local.read_bytes()
    assert names_path(out).read_bytes() == names_path(local).read_bytes()
    here, there = (json.loads(sidecar_path(path).read_text()) for path in (local, out))
    assert there.pop("source") == address
    assert re.fullmatch("[0-9a-f]{8}", there.pop("address_digest"))
    assert {key: here[key] for key in there if key != "fingerprint"} == {
        key: value for key, value in there.items() if key != "fingerprint"
    }
    assert {path.name for path in out.parent.iterdir()} == {path(out).name for path in (Path, sidecar_path, names_path)}


SOURCES = (
    "photos",
    "photos/",
    "photos/b",
    "x.zip",
    "shard-0.tar",
    "shard-{0,1}.tar",
    "shard-*.tar",
    "{shard-1,shard-0}.*",
)


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("query", ["", "a=/*[b&signature={secret,secret}"])
def test_a_web_source_gives_the_bytes_of_the_local_one(
    web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, query: str
) -> None:
    out, local, address = tmp_path / "out" / "o.beton", tmp_path / "l.beton", f"{web.address}/{name}"
    out.parent.mkdir()
    assert write(web.folder / name, local) == write(f"{address}?{query}" if query else address, out) == 0
    assert_same(out, local, address=address.rstrip("/"))
    assert web.queries == {query}
    assert "secret" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_in_memory_gives_the_bytes_of_the_local_one(memory: str, www: Path, tmp_path: Path, name: str) -> None:
    out, local, address = tmp_path / "out" / "o.beton", tmp_path / "l.beton", f"{memory}/{name}"
    out.parent.mkdir()
    assert write(www / name, local) == write(address, out) == 0
    assert_same(out, local, address=address.rstrip("/"))


def test_labels_that_lie_beside_mnist_are_fetched_too(tmp_path: Path, memory: str) -> None:
    images = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (3, 28, 28)) + bytes(range(256)) * 9 + bytes(48)
    files = {
        "train-images-idx3-ubyte.gz": gzip.compress(images),
        "train-labels-idx1-ubyte": b"\0\0\x08\1\0\0\0\3\0\2\1",
    }
    for name, content in files.items():
        fsspec.filesystem("memory").pipe(f"/bucket/mnist/{name}", content)
    assert write(f"{memory}/mnist/train-images-idx3-ubyte.gz", tmp_path / "o.beton") == 0
    with Reader(tmp_path / "o.beton") as reader:
        assert reader.labels is not None
        assert reader.labels.tolist() == [0, 2, 1]


def test_advice_about_the_files_of_a_fetched_folder_names_the_server(
    tmp_path: Path, memory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in folder_10(tmp_path / "cifar").iterdir():
        fsspec.filesystem("memory").pipe(f"/bucket/cifar/{path.name}", path.read_bytes())
    assert write(f"{memory}/cifar", tmp_path / "o.beton") == 0
    advice = f"test_batch (give {memory}/cifar/test_batch for it)"
    assert f"1 {advice}" in capsys.readouterr().out
    with Reader(tmp_path / "o.beton") as reader:
        assert advice in reader.sidecar["ignored_by_kind"]


def test_an_unchanged_source_is_not_fetched_again_and_a_changed_one_is(
    web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    counts = []
    for change in (None, None, "photos/a/0 x.jpg", "photos/b/new.jpg"):
        if change is not None:
            (web.folder / change).write_bytes(draw(50))
            os.utime(web.folder / change, (1, 1))
        assert write(f"{web.address}/photos", cache) == 0
        counts.append(web.fetched().total())
    assert counts == [len(PHOTOS) + 1, 0, len(PHOTOS) + 1, len(PHOTOS) + 2]  # with the notes
    assert capsys.readouterr().out.count("unchanged since it was written") == 1
    assert len(list(cache.glob("*.beton"))) == 3
    assert not list(cache.glob(".*"))


@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_transfer_that_was_cut_is_continued_or_begun_anew(www: Path, tmp_path: Path, has_ranges: bool) -> None:
    pytest.importorskip("aiohttp", reason="fsspec reads the web by aiohttp: pip install '.[remote]'")
    with zipfile.ZipFile(www / "large.zip", "w") as archive:
        for number in range(3):
            archive.writestr(f"{number}.jpg", draw(number, side=900))
    with Web(www, has_ranges=has_ranges).serving() as web:
        web.cut["/large.zip"] = [2**20]
        assert write(f"{web.address}/large.zip", tmp_path / "o.beton") == 0
        begun = [int(asked[6:-1] or 0) for _, asked in web.asked]
    assert begun[0] == 0 < begun[1] <= 2**20
    assert begun[2:] == ([] if has_ranges else [0])
    assert write(www / "large.zip", tmp_path / "l.beton") == 0
    assert (tmp_path / "o.beton").read_bytes() == (tmp_path / "l.beton").read_bytes()


def test_a_file_that_changes_while_it_is_fetched_is_never_taken_for_whole(
    web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    web.cut["/x.zip"], out = [1000], tmp_path / "o.beton"
    web.changed["/x.zip"] = (web.folder / "shard-0.tar").read_bytes()
    assert write(f"{web.address}/x.zip", out) == 2
    size = len(web.changed["/x.zip"])
    assert f"/x.zip: {size} bytes came, where the server had announced " in capsys.readouterr().err
    assert not out.exists()
    assert write(f"{web.address}/x.zip", out) == 0
    assert write(web.folder / "shard-0.tar", tmp_path / "l.beton") == 0
    assert out.read_bytes() == (tmp_path / "l.beton").read_bytes()


@pytest.mark.slow
def test_a_server_that_cuts_every_transfer_leaves_no_wrong_file(
    web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    web.cut["/photos/b/1 x.jpg"], out = [100] + [0] * 9, tmp_path / "o.beton"
    assert write(f"{web.address}/photos", out) == 2
    said = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"fastbyol-prep: note: \d+\.\d kB were fetched and stay in .*; the same command .*", said[1])
    assert re.fullmatch(r"fastbyol-prep: error: .*/photos/b/1%20x.jpg: the connection breaks; .*", said[2])
    assert len(said) == 3
    (copy,) = tmp_path.glob(".o.beton.*.fetched")
    for path in (copy / "files").rglob("*.*"):
        assert path.read_bytes() == (web.folder / "photos" / path.relative_to(copy / "files")).read_bytes()
    web.cut.clear()
    web.asked.clear()
    assert write(f"{web.address}/photos", out) == 0
    assert web.fetched() == {"/photos/b/1 x.jpg": 1}


def test_a_server_that_tells_no_length_is_read_to_the_end(web: Web, tmp_path: Path) -> None:
    web.size["/x.zip"] = None
    assert write(f"{web.address}/x.zip", tmp_path / "o.beton") == 0
    assert write(web.folder / "x.zip", tmp_path / "l.beton") == 0
    assert (tmp_path / "o.beton").read_bytes() == (tmp_path / "l.beton").read_bytes()


def test_a_server_that_sends_more_than_it_announced_is_stopped(
    web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (web.folder / "x.zip").write_bytes(bytes(3 * 2**24))
    web.size["/x.zip"] = 1000
    assert write(f"{web.address}/x.zip", tmp_path / "o.beton") == 2
    error = capsys.readouterr().err
    said = re.search(r"/x.zip: (\d+) bytes came, where the server had announced 1000; try again", error)
    assert said is not None
    assert int(said[1]) < 2**24
    assert not list(tmp_path.glob(".o.beton.*"))


def test_what_does_not_fit_on_the_disk_is_not_begun(
    web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    web.size["/x.zip"] = 10**15
    assert write(f"{web.address}/x.zip", tmp_path / "o.beton") == 2
    assert re.search(
        r"error: .*/x.zip: 1000000.0 GB are to be fetched, and \d+\.\d .B are free in .*; make room",
        capsys.readouterr().err,
    )
    assert not web.asked
    assert {path.name for path in tmp_path.iterdir()} == {"www"}


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (404, r"no such file or folder there \(status 404\); correct the address"),
        (403, r"access is refused \(status 403\); give credentials where fsspec looks for them: .*netrc.*"),
        (500, r"the server answers with status 500; try again later"),
    ],
)
def test_an_error_of_the_server_is_one_line(
    web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int, said: str
) -> None:
    web.status["/x.zip"] = status
    assert write(f"{web.address}/x.zip?token=secret", tmp_path / "o.beton") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(f"fastbyol-prep: error: {web.address}/x.zip: {said}", line)
    assert {path.name for path in tmp_path.iterdir()} == {"www"}


def test_a_file_that_is_listed_but_refused_is_named(
    web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    web.status["/photos/b/1 x.jpg"] = 403
    assert write(f"{web.address}/photos", tmp_path / "o.beton") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "access is refused (status 403)" in line


def test_a_server_that_is_away_is_one_line_and_names_what_was_converted_before(
    web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        away = f"http://127.0.0.1:{free.getsockname()[1]}/x.zip"
    assert write(away, cache) == 2
    assert re.search(
        r"cannot be read: .*[Cc]onnect.*; check the address and the network$", capsys.readouterr().err.strip()
    )
    assert write(f"{web.address}/x.zip", cache) == 0
    (beton,) = cache.glob("*.beton")
    web.status["/x.zip"] = 503
    assert write(f"{web.address}/x.zip", cache) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.endswith(f"{beton} was converted from it before: to use that as it is, give it")


def started(source: str, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([*COMMAND, source, out], stderr=subprocess.PIPE, text=True)


def wait_until(claim: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not claim():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_fetch_that_was_stopped_fetches_only_the_rest(web: Web, tmp_path: Path, number: signal.Signals) -> None:
    web.held.add("/photos/c/2 x.jpg")
    out = tmp_path / "o.beton"
    process = started(f"{web.address}/photos", out)
    listed = len(PHOTOS) + 1  # and the notes
    wait_until(
        lambda: any(_lines(path) == listed - 1 for path in tmp_path.glob(".o.beton.*.fetched/whole.jsonl")), process
    )
    sent = time.monotonic()
    process.send_signal(number)
    said = process.communicate()[1]
    assert time.monotonic() - sent < 10  # though the server holds up the last file
    if number == signal.SIGTERM:
        assert process.returncode == 75
        assert said.splitlines()[-1] == "fastbyol-prep: interrupted; the same command goes on where it was"
        assert re.search(r"note: \d+\.\d kB were fetched and stay in ", said)
    assert not out.exists()
    web.released.set()
    web.asked.clear()
    assert write(f"{web.address}/photos", out) == 0
    assert web.fetched() == {"/photos/c/2 x.jpg": 1}
    assert write(web.folder / "photos", tmp_path / "l.beton") == 0
    assert out.read_bytes() == (tmp_path / "l.beton").read_bytes()
    assert not list(tmp_path.glob(".o.beton.*"))


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def test_what_was_fetched_and_has_changed_since_is_fetched_again(memory: str, www: Path, tmp_path: Path) -> None:
    system, out = fsspec.filesystem("memory"), tmp_path / "o.beton"
    system.pipe("/bucket/photos/a/bad.jpg", b"no image")
    assert write(f"{memory}/photos", out) == 2
    (copy,) = tmp_path.glob(".o.beton.*.fetched")
    before = {path: path.stat().st_ino for path in (copy / "files").rglob("*.*")}
    system.pipe("/bucket/photos/a/bad.jpg", draw(60))
    system.rm("/bucket/photos/b", recursive=True)
    system.pipe("/bucket/photos/c/2 x.jpg", b"none, either")
    assert write(f"{memory}/photos", out) == 2
    after = {path: path.stat().st_ino for path in (copy / "files").rglob("*.*")}
    kept = {path.relative_to(copy / "files").as_posix() for path in after if after[path] == before.get(path)}
    assert kept == {f"{name}" for name in (*PHOTOS, "notes.md") if name[0] != "b" and name != "c/2 x.jpg"}
    assert not (copy / "files" / "b").exists()
    lay_out(www, {"photos/a/bad.jpg": draw(60)})
    shutil.rmtree(www / "photos" / "b")
    system.pipe("/bucket/photos/c/2 x.jpg", (www / "photos/c/2 x.jpg").read_bytes())
    assert write(f"{memory}/photos", out) == write(www / "photos", tmp_path / "l.beton") == 0
    assert out.read_bytes() == (tmp_path / "l.beton").read_bytes()


def test_messages_and_the_sidecar_name_the_server_and_no_secret(
    web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lay_out(web.folder, {"bad/b/1.jpg": b"no image", "bad/a/1.jpg": draw(1)})
    pack(web.folder / "cut.tar", {"a/1.jpg": draw(1), "a/2.jpg": draw(2)})
    os.truncate(web.folder / "cut.tar", 2500)
    place, out = web.address.removeprefix("http://"), tmp_path / "o.beton"
    assert write(f"{web.address}/bad", out) == 2
    assert f"error: {web.address}/bad: b/1.jpg: " in capsys.readouterr().err
    assert write(f"http://me:secret@{place}/cut.tar?signature=secret", out) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"fastbyol-prep: error: http://me@{place}/cut.tar: damaged or cut short")
    assert write(f"http://me:secret@{place}/x.zip?signature=secret", out) == 0
    said = "".join(capsys.readouterr())
    with Reader(out) as reader:
        assert reader.sidecar["source"] == f"http://me@{place}/x.zip"
    assert "secret" not in said


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("https://me:secret@host:80/a@b/", "https://me@host:80/a@b"),
        ("https://me:se@cret@host/x?signature=secret", "https://me@host/x"),
        ("https://me:secret/secret@host/x?to=a@b&signature=secret", "https://me@host/x"),
        ("https://me:secret?secret@host/x?signature=secret", "https://me@"),
        ("zip://a.jpg::https://me:secret/secret@host/x.zip", "zip://a.jpg::https://me@host/x.zip"),
        ("https://host:80/a@b", "https://host:80/a@b"),
        ("https://host:80?to=a@b&signature=secret", "https://host:80"),
    ],
)
def test_an_address_is_shown_without_its_secrets(given: str, wanted: str) -> None:
    assert shown(given) == wanted


def test_a_pattern_that_matches_nothing_is_named_without_a_signature(
    web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert write(f"{web.address}/none-*.tar?signature=secret", tmp_path / "o.beton") == 2
    assert "nothing matches none-*.tar; correct the pattern" in (said := capsys.readouterr().err)
    assert "secret" not in said


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"/bucket/x/a\0b.jpg": b""}, "which is no name of a file"),
        ({"/bucket/x/a": b"", "/bucket/x/a/1.jpg": b""}, "as a file and as a folder"),
    ],
)
def test_names_that_lead_elsewhere_or_clash_are_refused(
    memory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], files: dict[str, bytes], said: str
) -> None:
    system = fsspec.filesystem("memory")
    for name, content in files.items():
        system.store[name] = type(system.open("/bucket/x/new", "wb"))(system, name, content)
    assert write(f"{memory}/x", tmp_path / "o.beton") == 2
    assert said in capsys.readouterr().err


def test_a_fetched_table_takes_no_images_of_this_machine(
    memory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = lay_out(tmp_path / "tables", {"a.png": draw(1, kind="PNG"), "b/c.png": draw(2, kind="PNG")})
    lay_out(tmp_path, {"mine.png": draw(3, kind="PNG")})
    elsewhere = [str(tmp_path / "mine.png"), "../../mine.png", "b/../../../mine.png"]  # than in OUT.fetched/files
    pq.write_table(pa.table({"image": ["a.png", "b/c.png", "b/../a.png", *elsewhere]}), folder / "t.parquet")
    for name in ("a.png", "b/c.png", "t.parquet"):
        fsspec.filesystem("memory").pipe(f"/bucket/tables/{name}", (folder / name).read_bytes())
    assert write(f"{memory}/tables", tmp_path / "o.beton", "--on-error", "skip") == 0
    with Reader(tmp_path / "o.beton") as reader:
        assert len(reader) == 3
        assert [each["name"] for each in reader.sidecar["skipped"]] == elsewhere
    assert "its path leads out of what was fetched" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("memory://bucket/train.beton", "is of use only where it lies; copy it here, and give it as it is"),
        ("memory://bucket/list.txt", "is of use only where it lies; copy it here, and give the address of the images"),
        ("memory://bucket/shard-{0..2}.tar", "no such file or folder there"),
        ("memory://bucket/none-*.tar", r"nothing matches none-\*.tar; correct the pattern"),
        ("memory://bucket/*", "the pattern matches the folder photos"),
        ("memory://bucket/nothing", "no such file or folder there"),
        ("nowhere://bucket/x", "cannot be read: Protocol not known: nowhere; check the address"),
    ],
)
def test_what_is_no_source_is_said_in_one_line(
    memory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, said: str
) -> None:
    assert source.startswith((memory, "nowhere"))
    for name in ("train.beton", "list.txt"):
        fsspec.filesystem("memory").pipe(f"/bucket/{name}", b"x")
    assert write(source, tmp_path / "o.beton") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"fastbyol-prep: error: {re.escape(source)}: {said}", line)


@pytest.mark.parametrize("source", ["zip://a.jpg::memory://bucket/list.txt", "tar://a.jpg::memory://bucket/list.txt"])
def test_an_archive_that_is_none_is_said_in_one_line(
    memory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    assert source.endswith(f"::{memory}/list.txt")
    fsspec.filesystem("memory").pipe("/bucket/list.txt", b"x" * 2000)
    assert write(source, tmp_path / "o.beton") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fastbyol-prep: error: {source}: cannot be read: ")


def test_an_ftp_server_that_refuses_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"ftp://127.0.0.1:{server.getsockname()[1]}/x.zip"

        def refuse() -> None:
            with server.accept()[0] as connection:
                connection.sendall(b"530 nobody may log in\r\n")

        thread = threading.Thread(target=refuse)
        thread.start()
        assert write(address, tmp_path / "o.beton") == 2
        thread.join()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fastbyol-prep: error: {address}: cannot be read: 530 nobody may log in; ")


@pytest.mark.parametrize("words", [["OUT"], ["o.beton", "--labels-from"], ["o.beton", "--classes-from"]])
def test_what_has_to_lie_here_is_asked_for(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    given = ["s3://bucket/x" if word == "OUT" else word for word in words]
    assert main(["write", "here", *given, *(["s3://bucket/x"] if "OUT" not in words else [])]) == 2
    assert "s3://bucket/x given; wanted a path on this machine, so copy it here" in capsys.readouterr().err


def test_two_writes_of_one_source_at_once_do_not_disturb_each_other(web: Web, tmp_path: Path) -> None:
    web.held.add("/photos/c/2 x.jpg")
    cache = tmp_path / "cache"
    cache.mkdir()
    first = started(f"{web.address}/photos", cache)
    wait_until(lambda: any(path == "/photos/c/2 x.jpg" for path, _ in web.asked), first)
    second = started(f"{web.address}/photos", cache)
    assert second.stderr is not None
    said = second.stderr.readline()
    web.released.set()
    for process in (first, second):
        assert "error" not in process.communicate()[1]
        assert process.returncode == 0
    assert "note: waits for another write, which fetches to" in said
    assert len(list(cache.iterdir())) == 3


WHILE_REMOVED = """
import os, pathlib, sys
from fastbyol.data_prep.remote.copy import Copy, copy_path, remove_stale
from fastbyol.data_prep.remote.listing import look_up
import fsspec

fsspec.filesystem("memory").pipe("/bucket/x.jpg", b"x")
remote, here = look_up("memory://bucket/x.jpg"), pathlib.Path(sys.argv[1])
path, lock = copy_path(here, "o", remote), copy_path(here, "o", remote) / "lock"
left = []

def look(event, arguments):
    if event == "os.remove" and os.path.basename(arguments[0]) == "lock":
        left.append(sorted(os.listdir(path)))
    if event == "os.rmdir" and os.fspath(arguments[0]) == str(path) and sys.argv[2] == "begins":
        lock.touch()

with Copy(path, remote) as copy:
    (copy.files / "x.jpg").write_bytes(b"x")
    if sys.argv[3] == "itself":
        sys.addaudithook(look)
        copy.remove()
if sys.argv[3] == "another":
    sys.addaudithook(look)
    remove_stale(here, "o", keep=None)
print(left, path.exists())
"""


@pytest.mark.parametrize("remover", ["itself", "another"])
@pytest.mark.parametrize("other", ["begins", "none"])
def test_a_process_that_begins_while_a_copy_is_removed_waits_or_has_its_own(
    tmp_path: Path, other: str, remover: str
) -> None:
    command = (sys.executable, "-c", WHILE_REMOVED, tmp_path, other, remover)
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert said == f"[['lock']] {other == 'begins'}\n"
