"""Laws of a conversion that was stopped: the same command goes on behind what is whole, to the same bytes."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastbyol.beton import sidecar_path
from fastbyol.data_prep import writer
from fastbyol.data_prep.cli import main
from fastbyol.data_prep.images import prepare
from fastbyol.names import names_path
from tests.support.layouts import draw, lay_out

COMMAND = (sys.executable, "-m", "fastbyol.data_prep.cli", "write")
COUNT = 1500
FLAGS = ("--on-error", "skip", "--max-side", "24", "--workers", "2")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lay out images, a damaged one among each hundred, and one in a hundred that is repaired."""
    drawn = [draw(number) for number in range(20)]
    files = {}
    for number in range(COUNT):
        data = drawn[number % 20]
        kind = number % 100
        files[f"{'ab'[number % 2]}/{number:04}.jpg"] = (
            data[:200] if kind == 7 else data[:11] + b"\0\0" + data[13:] if kind == 9 else data
        )
    return lay_out(tmp_path_factory.mktemp("source"), files)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Convert them without interruption."""
    out = tmp_path_factory.mktemp("whole") / "o.beton"
    assert main([str(word) for word in ("write", source, out, *FLAGS)]) == 0
    return out


def assert_same(out: Path, whole: Path) -> None:
    for name in (lambda path: path, sidecar_path, names_path):
        assert name(out).read_bytes() == name(whole).read_bytes()
    assert {path.name for path in out.parent.iterdir()} == {"o.beton", "o.beton.json", "o.beton.names.gz"}


def stopped(source: Path, out: Path, number: signal.Signals, *, behind: int) -> str:
    """Convert, and send a signal once so many lines of the journal are written."""
    process = subprocess.Popen([*COMMAND, source, out, *FLAGS], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while sum(path.read_bytes().count(b"\n") for path in out.parent.glob(".*.journal.*")) < behind:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    return process.communicate()[1]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_conversion_goes_on_to_the_same_bytes(
    source: Path, whole: Path, tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "o.beton"
    said = stopped(source, out, number, behind=600 if number == signal.SIGKILL else 1100)
    assert not out.exists()
    if number == signal.SIGTERM:
        assert said == "fastbyol-prep: interrupted; the same command goes on where it was\n"
    seen: list[str] = []

    def counted(*given: object, **more: str) -> object:
        seen.append(more["name"])
        return prepare(*given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr("fastbyol.data_prep.convert.prepare", counted)
    assert main([str(word) for word in ("write", source, out, *FLAGS)]) == 0
    assert 0 < len(seen) <= COUNT - 512
    assert_same(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["images cut", "images changed", "journal cut", "journal changed"])
def test_what_is_not_whole_is_converted_again(source: Path, whole: Path, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "o.beton"
    stopped(source, out, signal.SIGKILL, behind=700)
    kind, how = damage.split()
    (path,) = tmp_path.glob(".o.beton.journal.*" if kind == "journal" else ".o.beton.????????.partial")
    data = path.read_bytes()
    middle = len(data) - (len(data) - (0 if kind == "journal" else 8 << 20)) // 2
    path.write_bytes(data[:middle] + (b"" if how == "cut" else bytes(50) + data[middle + 50 :]))
    assert main([str(word) for word in ("write", source, out, *FLAGS)]) == 0
    assert_same(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["flags", "source", "empty class"])
def test_another_conversion_does_not_go_on_from_it(
    source: Path, tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    here = shutil.copytree(source, tmp_path / "in")
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "o.beton"
    stopped(here, out, signal.SIGKILL, behind=300)
    if change == "source":
        (here / "a" / "0000.jpg").write_bytes(draw(99))
    if change == "empty class":
        (here / "Z").mkdir()  # sorted before a and b, whose numbers it shifts
    flags = ("--on-error", "skip", "--max-side", "20") if change == "flags" else FLAGS
    assert main([str(word) for word in ("write", here, out, *flags)]) == 0
    assert "left by a killed write" in capsys.readouterr().err
    fresh = tmp_path / "fresh.beton"
    assert main([str(word) for word in ("write", here, fresh, *flags)]) == 0
    assert out.read_bytes() == fresh.read_bytes()
    assert len(list(out.parent.iterdir())) == 3


def test_an_interruption_of_the_last_work_is_no_loss(
    source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls = tmp_path / "o.beton", []

    def interrupt(_: int) -> None:
        calls.append(1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(writer.os, "fsync", interrupt)
        assert main([str(word) for word in ("write", source, out, *FLAGS)]) == 75
    assert calls
    assert any(tmp_path.glob(".*.journal.*"))
    assert main([str(word) for word in ("write", source, out, *FLAGS)]) == 0
    assert_same(out, whole)


def test_few_images_are_not_kept(source: Path, tmp_path: Path) -> None:
    assert writer.GROUP < writer.KEEP_FROM < COUNT
    said = stopped(source, tmp_path / "o.beton", signal.SIGINT, behind=1)
    assert said == "fastbyol-prep: interrupted; unfinished files were removed\n"
    assert not list(tmp_path.iterdir())
