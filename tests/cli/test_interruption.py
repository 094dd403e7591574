"""Laws of interruption: a signal at any moment ends a run with status 75, and the run it began comes out the same."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastbyol.cli.train import main
from fastbyol.monitor.metrics import read_metrics
from fastbyol.storage.run_folder import RunFolder
from tests.conftest import Betons
from tests.support.commands import PATIENCE_S, TRAIN, Fork, arguments, start, wait_until

EPOCHS = "--epochs=6"


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(RunFolder(out).encoder)


@pytest.fixture(scope="module")
def finished(betons: Betons, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train 20 steps without interruption."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main(arguments(betons, out, EPOCHS, f"--val={betons.val}")) == 0
    return out


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "rehearsal": lambda out: RunFolder(out).rehearsal.path.exists(),
    "first row": lambda out: len(read_metrics(RunFolder(out).metrics)) > 0,
    "a save": lambda out: any(RunFolder(out).checkpoints.glob("*.partial")),
    "the closing work": lambda out: RunFolder(out).encoder.exists(),
}


@pytest.mark.parametrize(("moment", "number"), list(zip(MOMENTS, 2 * (signal.SIGTERM, signal.SIGUSR1), strict=True)))
def test_a_signal_at_any_moment_loses_nothing(
    betons: Betons, finished: Path, tmp_path: Path, moment: str, number: signal.Signals
) -> None:
    out = tmp_path / "run"
    asked = arguments(betons, out, EPOCHS, f"--val={betons.val}", "--checkpoint-every=0.01s")
    process = Fork(tmp_path / "said", *asked)
    wait_until(lambda: MOMENTS[moment](out), process)
    process.send_signal(number)
    sent_s = time.monotonic()
    _, said = process.communicate()
    assert time.monotonic() - sent_s < 10
    assert process.returncode == 75, said
    assert "Traceback" not in said
    assert main([*asked, "--resume"]) == 0
    assert all(torch.equal(value, weights(out)[name]) for name, value in weights(finished).items())


def answers(process: subprocess.Popen[str]) -> bool:
    """Tell whether a process has a handler of its own for SIGTERM."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line.split()[1] for line in status.split("\n") if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


MODULE = (sys.executable, "-m", "fastbyol.train")


@pytest.mark.parametrize(("command", "after_s"), [(TRAIN, 0.0), (TRAIN, 0.5), (TRAIN, 1.5), (MODULE, 0.0)])
def test_a_signal_during_start_up_is_answered(
    betons: Betons, tmp_path: Path, command: tuple[str, ...], after_s: float
) -> None:
    process = start(*command, *arguments(betons, tmp_path / "run", EPOCHS))
    wait_until(lambda: answers(process), process)
    time.sleep(after_s)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 75, said
    assert "interrupted" in said
    assert "Traceback" not in said


def test_a_signal_after_the_rehearsal_is_answered(betons: Betons, tmp_path: Path) -> None:
    rehearsal = RunFolder(tmp_path / "run").rehearsal.path
    process = Fork(tmp_path / "said", *arguments(betons, tmp_path / "run", "--budget=1h"))
    wait_until(rehearsal.exists, process)
    wait_until(lambda: not rehearsal.exists(), process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 75, said
    assert "Traceback" not in said


def test_a_second_signal_quits_at_once(betons: Betons, tmp_path: Path) -> None:
    """One step takes seconds here: the first signal would wait for it, the second does not, and nothing is saved."""
    folder = RunFolder(tmp_path / "run")
    asked = arguments(betons, folder.path, "--epochs=400", "--batch-size=160", "--micro-batches=80")
    process = Fork(tmp_path / "said", *asked)
    wait_until(folder.metrics.exists, process)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    _, said = process.communicate()
    assert process.returncode == 75
    assert "Traceback" not in said
    assert not folder.report.exists()
