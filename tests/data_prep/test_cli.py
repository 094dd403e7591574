"""Laws of fastbyol-prep, held by real processes on real files: what is written, what is refused, what a kill leaves."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastbyol.beton import Reader
from fastbyol.data_prep.cli import build_parser, main
from fastbyol.data_prep.convert import convert
from fastbyol.data_prep.settings import MODES, Settings
from fastbyol.data_prep.sources import open_source
from fastbyol.data_prep.sources.base import SourceError
from tests.support.commands import PATIENCE_S
from tests.support.layouts import draw, lay_out, pack

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "fastbyol.data_prep.cli"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Write three classes of twelve images, JPEG and PNG."""
    for number in range(36):
        name = tmp_path / "source" / "abc"[number % 3] / f"{number:02}.{'png' if number % 4 == 0 else 'jpg'}"
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_bytes(draw(number, kind="PNG" if number % 4 == 0 else "JPEG"))
    return tmp_path / "source"


def run(*arguments: object, limit: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, preexec_fn=limit)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("mode", MODES)
def test_worker_count_does_not_change_a_byte(source: Path, tmp_path: Path, mode: str) -> None:
    written = set()
    for workers in ("1", "2", "7"):
        out = tmp_path / "a.beton"
        arguments = [
            "write",
            str(source),
            str(out),
            "--mode",
            mode,
            "--workers",
            workers,
            "--overwrite",
            "--max-side",
            "30",
        ]
        assert main(arguments) == 0
        written.add((out.read_bytes(), (tmp_path / "a.beton.json").read_bytes()))
    assert len(written) == 1


def test_passthrough_stores_the_files_bytes(source: Path, tmp_path: Path) -> None:
    assert main(["write", str(source), str(tmp_path / "a.beton"), "--mode", "passthrough"]) == 0
    with Reader(tmp_path / "a.beton") as reader:
        files = sorted(source.rglob("*.*"))
        assert reader.labels is not None
        assert reader.labels.tolist() == [ord(path.parent.name) - ord("a") for path in files]
        assert reader.class_names == ["a", "b", "c"]
        for index, path in enumerate(files):
            assert (bytes(reader.payload(index)) == path.read_bytes()) == (path.suffix == ".jpg")


def test_tar_and_folder_give_the_same_images(source: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for path in sorted(source.rglob("*.*")):
            archive.add(path, f"leading/{path.relative_to(source)}")
    for name, place in {"a": source, "b": tmp_path / "s.tar"}.items():
        assert main(["write", str(place), str(tmp_path / f"{name}.beton")]) == 0
    assert (tmp_path / "a.beton").read_bytes() == (tmp_path / "b.beton").read_bytes()


def test_file_names_need_not_be_text(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"source/caf\xe9")
    folder.mkdir(parents=True)
    (folder / os.fsdecode(b"\xff.jpg")).write_bytes(b"bad")
    (folder / "good.jpg").write_bytes(draw(0))
    done = run("write", tmp_path / "source", tmp_path / "a.beton", "--on-error", "skip")
    assert (done.returncode, done.stderr) == (0, "")
    for command in ("verify", "info"):
        assert run(command, tmp_path / "a.beton").returncode == 0
    with Reader(tmp_path / "a.beton") as reader:
        assert reader.class_names == [folder.name]


def test_limit_reaches_every_class(source: Path, tmp_path: Path) -> None:
    for limit in (3, 7, 36, 1000):
        assert main(["write", str(source), str(tmp_path / "a.beton"), "--limit", str(limit), "--overwrite"]) == 0
        with Reader(tmp_path / "a.beton") as reader:
            assert len(reader) == min(limit, 36)
            assert reader.labels is not None
            assert set(reader.labels.tolist()) == {0, 1, 2}


def test_unlabelled_folder_gives_one_field(source: Path, tmp_path: Path) -> None:
    assert main(["write", str(source / "a"), str(tmp_path / "a.beton")]) == 0
    with Reader(tmp_path / "a.beton") as reader:
        assert (reader.labels, reader.class_names, reader.field_names) == (None, None, ["image"])


def test_lossless_images_that_become_jpeg_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lay_out(tmp_path / "in", {"a.png": draw(0, kind="PNG", side=64), "b.png": draw(1, kind="PNG", side=66)})
    write = ["write", str(tmp_path / "in"), str(tmp_path / "a.beton"), "--overwrite"]
    told = {}
    for mode in ("auto", "raw"):
        assert main([*write, "--mode", mode]) == 0
        told[mode] = "lossless images above 64 px, such as b.png, became JPEG" in capsys.readouterr().out
    assert told == {"auto": True, "raw": False}


def spoil(source: Path) -> list[str]:
    """Damage two images of the source in ways that many decoders pass over."""
    cut = source / "b" / "01.jpg"
    cut.write_bytes(cut.read_bytes()[:-200])
    (source / "c" / "02.jpg").write_bytes(b"<html>404</html>")
    return ["b/01.jpg", "c/02.jpg"]


def test_on_error_fail_names_the_image(source: Path, tmp_path: Path) -> None:
    bad = spoil(source)
    done = run("write", source, tmp_path / "a.beton")
    assert done.returncode == 2
    assert bad[0] in done.stderr
    assert "--on-error skip" in done.stderr
    assert names_in(tmp_path) == {"source"}


def test_on_error_skip_records_the_images(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = spoil(source)
    (source / "a" / "00.png").unlink()
    (source / "a" / "00.png").symlink_to(source / "a" / "03.jpg")
    assert main(["write", str(source), str(tmp_path / "a.beton"), "--on-error", "skip"]) == 0
    skipped = json.loads((tmp_path / "a.beton.json").read_text())["skipped"]
    assert [entry["name"] for entry in skipped] == bad
    assert all(entry["reason"] for entry in skipped)
    assert "skipped 2 bad images" in capsys.readouterr().out
    with Reader(tmp_path / "a.beton") as reader:
        assert len(reader) == 34
    assert main(["verify", str(tmp_path / "a.beton")]) == 0


def test_all_images_bad_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.jpg").write_bytes(b"nothing")
    assert main(["write", str(tmp_path / "source"), str(tmp_path / "a.beton"), "--on-error", "skip"]) == 2
    assert "no image was written" in capsys.readouterr().err
    assert names_in(tmp_path) == {"source"}


BAD_INPUT = {
    "missing source": (["write", "nowhere", "a.beton"], "no such file or folder"),
    "empty folder": (["write", "empty", "a.beton"], "no images"),
    "not a tar": (["write", "text", "a.beton"], "neither a folder, nor a .tar"),
    "existing output": (["write", "source", "text"], "output exists; give --overwrite"),
    "missing output folder": (["write", "source", "no/a.beton"], "does not exist"),
    "unwritable output": (["write", "source", "/proc/self/a.beton"], "/proc/self/a.beton"),
    "quality": (["write", "source", "a.beton", "--quality", "101"], "1 to 100"),
    "limit": (["write", "source", "a.beton", "--limit", "0"], "from 1"),
    "max side": (["write", "source", "a.beton", "--max-side", "big"], "'big' given"),
    "mode": (["write", "source", "a.beton", "--mode", "png"], "invalid choice"),
    "share": (["write", "source", "a.beton", "--mode", "proportion", "--jpeg-share", "1.5"], "from 0 to 1"),
    "share of no mix": (["write", "source", "a.beton", "--jpeg-share", "0.5"], "give it with mode proportion"),
    "pattern without files": (["write", "shard-{0..3}.tar", "a.beton"], "shard-0.tar does not exist"),
    "pattern not quoted": (["write", "0.tar", "1.tar", "2.tar", "a.beton"], "quote a pattern"),
    "classes from nowhere": (["write", "source", "a.beton", "--classes-from", "no.json"], "cannot be read"),
    "classes from text": (["write", "source", "a.beton", "--classes-from", "text"], "text: "),
    "column of a folder": (
        ["write", "source", "a.beton", "--label-column", "x"],
        "--label-column x is given, which a folder of images has no use for; leave it out",
    ),
    "no command": ([], "COMMAND"),
    "unknown command": (["wirte"], "invalid choice"),
    "verify nothing": (["verify", "nowhere.beton"], "cannot be opened"),
    "verify text": (["verify", "text"], "text: "),
    "info on text": (["info", "text"], "text: "),
    "info on a folder": (["info", "empty"], "cannot be opened"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_line(
    source: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = BAD_INPUT[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("This is a text of more than twenty-four bytes.")
    monkeypatch.chdir(tmp_path)
    assert source.exists()
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("fastbyol-prep: error: ")
    assert message in said.err
    assert (said.err.count("\n"), said.out) == (1, "")
    assert names_in(tmp_path) == {"source", "empty", "text"}


def test_a_real_process_reports_bad_input_in_one_line(tmp_path: Path) -> None:
    done = run("info", tmp_path / "nowhere.beton")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_a_library_that_logs_does_not_break_the_line(tmp_path: Path) -> None:
    data = bytearray(draw(0, kind="TIFF"))
    at = data.index(b"\x15\x01\x03\x00")  # tag 277, samples per pixel
    data[at + 8 : at + 10] = b"\x00\x08"
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.tif").write_bytes(data)
    done = run("write", tmp_path / "source", tmp_path / "a.beton")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr


@pytest.mark.parametrize("room", [1 << 23, (1 << 23) + 9000, 1 << 24], ids=["no image", "some images", "no table"])
def test_full_disk_leaves_nothing(source: Path, tmp_path: Path, room: int) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    done = run("write", source, tmp_path / "a.beton", limit=small_files)
    assert done.returncode == 2
    assert done.stderr.startswith(f"fastbyol-prep: error: {tmp_path / 'a.beton'}: ")
    assert done.stderr.count("\n") == 1
    assert names_in(tmp_path) == {"source"}


def test_unreadable_image_is_a_bad_image(source: Path, tmp_path: Path) -> None:
    (source / "b" / "01.jpg").unlink()
    (source / "b" / "01.jpg").symlink_to("/proc/self/mem")  # a plain file whose first byte gives EIO
    done = run("write", source, tmp_path / "a.beton")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "b/01.jpg: cannot be read: Input/output error" in done.stderr
    assert names_in(tmp_path) == {"source"}
    assert run("write", source, tmp_path / "a.beton", "--on-error", "skip").returncode == 0
    with Reader(tmp_path / "a.beton") as reader:
        assert len(reader) == 35


def test_a_source_that_breaks_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    archive = pack(tmp_path / "s.tar", {f"{number}.jpg": draw(number) for number in range(200)})
    source = open_source(archive)
    os.truncate(archive, archive.stat().st_size // 2)
    with pytest.raises(SourceError, match=r"s\.tar: damaged or cut short"):
        convert(source, tmp_path / "a.beton", Settings(), workers=2, on_error="skip")
    assert names_in(tmp_path) == {"s.tar"}


def start_long_write(tmp_path: Path) -> subprocess.Popen[str]:
    """Start a write of minutes; return once images are going into the temporary file."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "0.jpg").write_bytes(draw(0, side=1500))
    for number in range(1, 2000):
        os.link(folder / "0.jpg", folder / f"{number}.jpg")
    command = [*COMMAND, "write", str(folder), str(tmp_path / "a.beton"), "--max-side", "1500", "--workers", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not any(path.stat().st_size > 12 << 20 for path in tmp_path.glob(".a.beton.*.partial")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_signal_in_the_middle_leaves_nothing_under_the_name(tmp_path: Path, number: signal.Signals) -> None:
    with start_long_write(tmp_path) as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE_S)
    left = names_in(tmp_path) - {"source"}
    assert not {"a.beton", "a.beton.json"} & left
    if number == signal.SIGKILL:
        assert len(left) == 3  # the images, their names and the journal
        shutil.rmtree(tmp_path / "source")
        (tmp_path / "source").mkdir()
        (tmp_path / "source" / "0.jpg").write_bytes(draw(0))
        again = run("write", tmp_path / "source", tmp_path / "a.beton")
        assert again.returncode == 0
        assert next(name for name in left if "names" not in name and "journal" not in name) in again.stderr, (
            "the next write removes what the killed one left, and says so"
        )
        assert names_in(tmp_path) == {"source", "a.beton", "a.beton.json", "a.beton.names.gz"}
    else:
        assert (process.returncode, out, err.count("\n"), left) == (75, "", 1, set())


@pytest.fixture
def written(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["write", str(source), str(tmp_path / "a.beton"), "--mode", "jpeg"]) == 0
    capsys.readouterr()
    return tmp_path / "a.beton"


def test_verify_passes_what_write_made(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(written), "--workers", "3"]) == 0
    assert "36 samples decode; checksums match" in capsys.readouterr().out
    written.with_name("a.beton.json").unlink()
    assert main(["verify", str(written)]) == 0
    assert "no checksum" in capsys.readouterr().out


def test_verify_names_the_bad_sample(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Reader(written) as reader:
        start = int(reader.offsets[13])
    with written.open("r+b") as stream:
        stream.seek(start)
        stream.write(b"\0" * 100)
    assert main(["verify", str(written)]) == 2
    said = capsys.readouterr()
    assert "sample 13 (b/04.png, class b): " in said.out
    assert (
        said.err == f"fastbyol-prep: error: {written}: 2 faults in 36 samples; write the file again or restore a copy\n"
    )


def test_verify_sees_every_flip_of_a_written_file(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = written.stat().st_size
    with Reader(written) as reader:
        used = int(reader.offsets[-1] + reader.sizes[-1])
    rng = np.random.default_rng(0)
    head, images, table = (
        rng.integers(0, 3000, 6),
        rng.integers(1 << 23, used, 6),
        rng.integers(size - 36 * 24, size, 4),
    )
    for place in (*head, *images, used + 1, *table):
        flip(written, int(place))
        assert main(["verify", str(written)]) == 2
        flip(written, int(place))
    capsys.readouterr()
    assert main(["verify", str(written)]) == 0


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(place)
        (byte,) = stream.read(1)
        stream.seek(place)
        stream.write(bytes([byte ^ 0x40]))


def test_info_counts(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(written), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["samples"] == 36
    assert facts["classes"] == {"a": 12, "b": 12, "c": 12}
    assert facts["fields"] == ["image", "label"]
    assert facts["images"] == {"jpeg": 36, "raw": 0}
    assert facts["width_px"] == {"min": 40, "median": 43.0, "max": 46, "mean": pytest.approx(42 + 11 / 12)}
    assert facts["sidecar"]["settings"] == {"mode": "jpeg", "max_side": 500, "quality": 90, "limit": None}
    assert main(["info", str(written)]) == 0
    text = capsys.readouterr().out
    for words in ("36 (36 JPEG, 0 raw)", "image, label", "a 12, b 12, c 12", "40 / 43 / 46 px", "pages of 8 MiB"):
        assert words in text
    written.with_name("a.beton.json").unlink()
    assert main(["info", str(written)]) == 0
    assert "0 12, 1 12, 2 12" in capsys.readouterr().out


def test_output_may_be_cut_by_a_pipe(written: Path) -> None:
    command = f"{' '.join(COMMAND)} info {written} --json | head -c 1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("{", "")


def test_flags_are_the_contract() -> None:
    parser = build_parser()
    write = vars(parser.parse_args(["write", "S", "O.beton"]))
    settings = {"max_side": 500, "quality": 90, "mode": "auto", "on_error": "fail", "limit": None, "overwrite": False}
    assert {key: write[key] for key in settings} == settings
    parser.parse_args(
        [
            "write",
            "S",
            "O",
            "--max-side",
            "1",
            "--quality",
            "2",
            "--mode",
            "raw",
            "--workers",
            "3",
            "--on-error",
            "skip",
            "--limit",
            "4",
            "--overwrite",
        ]
    )
    parser.parse_args(["verify", "F", "--workers", "2"])
    assert parser.parse_args(["info", "F", "--json"]).json
    assert parser.parse_args(["demo", "D", "--seed", "3", "--overwrite"]).seed == 3
