"""Commands that tests start as processes: alone, as ranks, or as ranks under torchrun."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from fastbyol.cli import start as entry_points
from tests.conftest import Betons
from tests.support.forks import CONTEXT

TRAIN = (
    sys.executable,
    "-c",
    "import sys; from fastbyol.cli.start import train; sys.exit(train())",
)  # as fastbyol-train
PATIENCE_S = 240.0  # for a busy machine


class Process(Protocol):
    """What subprocess.Popen and Fork have in common."""

    def poll(self) -> int | None: ...
    def communicate(self) -> tuple[str, str]: ...


def arguments(betons: Betons, out: Path, *more: str) -> list[str]:
    """Give the arguments of a small run, in the same precision on any CPU; `more` come last."""
    machine = ("--device=cpu", "--precision=float32", "--workers=1")
    given = (f"--data={betons.train}", f"--out={out}", "--batch-size=48", *machine)
    return ["demo", *given, "--log-every=1", "--warmup-epochs=0.5", "--no-tensorboard", *more]


def start(*command: str) -> subprocess.Popen[str]:
    """Start a process whose words can be read afterwards."""
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


class Fork:
    """A fastbyol-train in a process of its own, forked from a server that has imported torch: 2 s of CPU time less.

    What depends on the import itself, such as a signal during it, needs start(*TRAIN, ...).
    """

    def __init__(self, said: Path, *asked: str, **environment: str) -> None:
        self._said = said  # the file of what it prints
        self._process = CONTEXT.Process(target=_train, args=(said, asked, environment))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Return the status once the process has ended; below 0, it is the signal that ended it."""
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float = PATIENCE_S) -> tuple[str, str]:
        """Wait for the end; return nothing, as all is in the second, and what the process printed."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(f"after {timeout:g} s: {self._said.read_text()}")
        return "", self._said.read_text()


def _train(said: Path, asked: tuple[str, ...], environment: dict[str, str]) -> None:
    with said.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    os.environ.update(environment)
    sys.argv[1:] = asked
    entry_points.train()


def start_ranks(folder: Path, ranks: int, *asked: str) -> list[Fork]:
    """Start fastbyol-train as ranks on this machine, as torchrun does, and without it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost"}
    return [
        Fork(folder / f"rank{rank}", *asked, **world, MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(ranks)
    ]


def torchrun(
    ranks: int, *asked: str, restarts: int = 0, module: str = "torch.distributed.run"
) -> subprocess.Popen[str]:
    """Start fastbyol-train as ranks on this machine."""
    launcher = (sys.executable, "-m", module, "--standalone", f"--nproc-per-node={ranks}")
    return start(*launcher, f"--max-restarts={restarts}", "--no-python", *TRAIN, *asked)


def wait_until(claim: Callable[[], bool], process: Process) -> None:
    """Wait for a claim to hold while a process runs."""
    deadline = time.monotonic() + PATIENCE_S
    while not claim():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "this takes too long"
        time.sleep(0.01)
