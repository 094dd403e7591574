"""Laws of output: a reader that has gone or a full disk ends no work; what a disk refused changes the status."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fastbyol.storage.run_folder import RunFolder
from tests.conftest import Betons
from tests.support.commands import PATIENCE_S, TRAIN, arguments

WORK = """
import sys
from pathlib import Path
from fastbyol.system.output import run_command

def main():
    for _ in range(3):
        print("row", flush=True)
        print("progress", file=sys.stderr, flush=True)
    print({name!r})
    Path({done!r}).touch()
    return {status}

sys.exit(run_command("work", main))
"""
QUESTIONS = {  # a command of each kind, with words that it answers at length
    "train": "from fastbyol.cli.start import train as main; main()\n--recipes",
    "eval": "from fastbyol.cli.start import evaluate as main; main()\n--help",
    "embed": "from fastbyol.cli.start import embed as main; main()\n--help",
    "prep": "import sys; from fastbyol.data_prep.cli import main; sys.exit(main())\nwrite --help",
}


@contextmanager
def broken_pipe() -> Iterator[int]:
    """Open a pipe whose reader has gone, as `| head` goes."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        yield writer
    finally:
        os.close(writer)


def work(done: Path, *, name: str = "", status: int = 0, redirected: str = "", **environment: str) -> tuple[int, str]:
    """Do work that prints; return its status and what a shell reads of it."""
    code = WORK.format(name=name, done=str(done), status=status)
    ended = subprocess.run(
        ["bash", "-c", f'"$@" {redirected}', "bash", sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | environment,
        timeout=PATIENCE_S,
        check=False,
    )
    return ended.returncode, ended.stdout.decode()


def test_a_pipe_that_does_not_block_gets_all_of_it(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    code = WORK.format(name="many", done=str(tmp_path / "done"), status=0).replace("'many'", "'x' * 300_000")
    with subprocess.Popen([sys.executable, "-c", code], stdout=writer, stderr=subprocess.DEVNULL) as process:
        os.close(writer)
        with os.fdopen(reader, "rb") as file:
            assert file.read().count(b"x") == 300_000
        assert process.wait(PATIENCE_S) == 0


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("status", [0, 75])
@pytest.mark.parametrize("redirected", ["2>/dev/full", "2>&-", ">&-", ">&- 2>&-"])
def test_work_goes_on_without_its_output(tmp_path: Path, redirected: str, status: int, unbuffered: str) -> None:
    ended, said = work(tmp_path / "done", status=status, redirected=redirected, PYTHONUNBUFFERED=unbuffered)
    assert (ended, (tmp_path / "done").exists()) == (status, True), said
    assert "Traceback" not in said


@pytest.mark.parametrize("status", [0, 75])
def test_what_a_disk_refused_is_told_in_one_line_after_the_work(tmp_path: Path, status: int) -> None:
    ended, said = work(tmp_path / "done", status=status, redirected=">/dev/full")
    assert (ended, (tmp_path / "done").exists()) == (status or 2, True)
    error = "work: error: stdout: No space left on device; check the path, its permissions and the space left\n"
    assert said == 3 * "progress\n" + ("" if status else error)


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict"])
def test_names_that_are_no_text_are_escaped(tmp_path: Path, encoding: str) -> None:
    ended, said = work(tmp_path / "done", name=os.fsdecode(b"v\xff.npy"), PYTHONIOENCODING=encoding)
    assert ended == 0
    assert "v\\udcff.npy\n" in said


@pytest.mark.parametrize("command", QUESTIONS)
def test_every_command_answers_into_a_pipe_without_reader_and_onto_a_full_disk(command: str) -> None:
    code, words = QUESTIONS[command].split("\n")
    asked = [sys.executable, "-c", code, *words.split()]
    with broken_pipe() as pipe:
        ended = subprocess.run(asked, stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    with Path("/dev/full").open("w") as disk:
        ended = subprocess.run(asked, stdout=disk, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"fastbyol-{command}: error: stdout: No space left on device; ")
    assert ended.stderr.count("\n") == 1


def test_a_training_whose_reader_has_gone_is_finished(betons: Betons, tmp_path: Path) -> None:
    asked = arguments(betons, tmp_path / "run", "--epochs=1")
    with broken_pipe() as pipe:
        ended = subprocess.run([*TRAIN, *asked], stdout=pipe, stderr=pipe, timeout=PATIENCE_S, check=False)
    assert (ended.returncode, RunFolder(tmp_path / "run").result.exists()) == (0, True)


@pytest.mark.parametrize("command", ["train", "eval", "embed"])
def test_a_module_ends_at_once_as_its_command_does(command: str) -> None:
    """Unloading torch would take a second of the budget after the run has told how long it took."""
    code = (
        "import atexit, runpy; atexit.register(print, 'unloading'); "
        f"runpy.run_module('fastbyol.{command}', run_name='__main__')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    assert f"usage: fastbyol-{command}" in ended.stdout
    assert "unloading" not in ended.stdout
