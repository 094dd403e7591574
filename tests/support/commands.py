"""Commands that tests start as processes: alone, or as ranks under torchrun."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.conftest import Betons

TRAIN = (
    sys.executable,
    "-c",
    "import sys; from fastbyol.cli.start import train; sys.exit(train())",
)  # as fastbyol-train
PATIENCE_S = 240.0  # for a busy machine


def arguments(betons: Betons, out: Path, *more: str) -> list[str]:
    """Give the arguments of a small run; `more` come last."""
    given = (f"--data={betons.train}", f"--out={out}", "--batch-size=48", "--device=cpu", "--workers=1")
    return ["demo", *given, "--log-every=1", "--warmup-epochs=0.5", "--no-tensorboard", *more]


def start(*command: str) -> subprocess.Popen[str]:
    """Start a process whose words can be read afterwards."""
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def torchrun(ranks: int, *asked: str, restarts: int = 0) -> subprocess.Popen[str]:
    """Start fastbyol-train as ranks on this machine."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
    return start(*launcher, f"--max-restarts={restarts}", "--no-python", *TRAIN, *asked)


def wait_until(claim: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for a claim to hold while a process runs."""
    deadline = time.monotonic() + PATIENCE_S
    while not claim():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "this takes too long"
        time.sleep(0.01)
