"""Laws of several ranks: one loss curve, one writer, one end, whichever rank it begins with."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
from torch.distributed import HashStore

from fastbyol.cli.torchrun import main as run_torchrun
from fastbyol.cli.train import main
from fastbyol.monitor.metrics import read_metrics
from fastbyol.storage import checkpoint
from fastbyol.storage.run_folder import RunFolder
from fastbyol.system import distributed
from fastbyol.system.distributed import World, _rendezvous_prefix, join_ranks
from tests.conftest import Betons
from tests.support import tolerances
from tests.support.commands import PATIENCE_S, Fork, arguments, start_ranks, torchrun, wait_until

EPOCHS = "--epochs=6"  # of 160 images: 20 steps of 48


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(RunFolder(out).metrics)]


@pytest.fixture(scope="module")
def alone(betons: Betons, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train 20 steps in one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert main(arguments(betons, out, EPOCHS)) == 0
    return out


def test_one_process_agrees_with_itself() -> None:
    with join_ranks("cpu", {}) as world:
        assert world == World()
        assert world.is_main
        assert world.total([1.0, 2.5]) == [1.0, 2.5]
        assert world.from_main("plan") == "plan"


@pytest.mark.slow
def test_three_ranks_reach_the_loss_curve_of_one_process(betons: Betons, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    asked = arguments(betons, out, EPOCHS, f"--val={betons.val}", "--knn-at=0.5")
    for process in start_ranks(tmp_path, 3, *asked):
        _, said = process.communicate()
        assert process.returncode == 0, said
    assert len(losses(out)) == 20
    assert losses(out) == pytest.approx(losses(alone), rel=tolerances.RANKS_LOSS)
    result = json.loads(RunFolder(out).result.read_text())
    assert (result["steps"], result["images"]) == (20, 960)
    assert [row["step"] for row in read_metrics(RunFolder(out).metrics) if "knn_top1" in row] == [10, 20]


@pytest.mark.slow
def test_srun_tells_ranks_without_torchrun(betons: Betons, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "0"}
    step = {**job, "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "localhost"}
    asked = arguments(betons, out, EPOCHS)
    tasks = [
        Fork(tmp_path / f"task{task}", *asked, SLURM_PROCID=str(task), SLURM_LOCALID=str(task), **step)
        for task in range(2)
    ]
    for process in tasks:
        _, said = process.communicate()
        assert process.returncode == 0, said
    assert losses(out) == pytest.approx(losses(alone), rel=tolerances.RANKS_LOSS)


@pytest.mark.slow
def test_a_signal_to_torchrun_ends_in_the_ranks_status_without_a_traceback(betons: Betons, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = torchrun(2, *arguments(betons, out, "--epochs=600"), module="fastbyol.cli.torchrun")
    wait_until(lambda: len(losses(out)) >= 5, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 75, said
    assert "Traceback" not in said
    assert "SIGTERM ended the ranks" in said
    assert checkpoint.load_newest(RunFolder(out).checkpoints)[0]["step"] >= 5


def test_torchrun_ends_with_the_status_of_a_rank(capfd: pytest.CaptureFixture[str]) -> None:
    command = ["--standalone", "--nproc-per-node=2", "--no-python", "bash", "-c", "exit 3"]
    assert run_torchrun(command) == 3
    assert "ended with status 3" in capfd.readouterr().err


@pytest.mark.slow
def test_a_run_resumes_on_another_number_of_ranks(betons: Betons, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = torchrun(2, *arguments(betons, out, EPOCHS))
    wait_until(lambda: len(losses(out)) >= 5, process)
    process.send_signal(signal.SIGTERM)  # torchrun hands it on
    process.communicate(timeout=PATIENCE_S)
    assert not RunFolder(out).result.exists()
    state, _ = checkpoint.load_newest(RunFolder(out).checkpoints)
    assert state["step"] == len(losses(out))
    assert main(arguments(betons, out, EPOCHS, "--resume")) == 0
    assert losses(out) == pytest.approx(losses(alone), rel=tolerances.RANKS_LOSS)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_ends_all_and_a_restart_resumes(
    betons: Betons, alone: Path, tmp_path: Path, victim: int
) -> None:
    out = tmp_path / "run"
    asked = arguments(betons, out, EPOCHS, "--checkpoint-every=0.01s", "--resume")
    process = torchrun(2, *asked, restarts=0 if victim else 1)
    wait_until(lambda: len(losses(out)) >= 5, process)
    children = psutil.Process(process.pid).children()
    ranks = {int(child.environ()["RANK"]): child for child in children}
    os.kill(ranks[victim].pid, signal.SIGKILL)
    killed_s = time.monotonic()
    psutil.wait_procs(ranks.values(), timeout=PATIENCE_S)
    assert time.monotonic() - killed_s < 30
    _, said = process.communicate(timeout=PATIENCE_S)
    if victim:
        assert process.returncode != 0
        assert "SIGKILL" in said
        assert "another rank has ended" in said
    else:
        assert process.returncode == 0, said
        assert losses(out) == pytest.approx(losses(alone), rel=tolerances.RANKS_LOSS)


def test_a_batch_that_does_not_divide_is_refused_by_every_rank(betons: Betons, tmp_path: Path) -> None:
    for process in start_ranks(tmp_path, 2, *arguments(betons, tmp_path / "run", EPOCHS, "--batch-size=33")):
        _, said = process.communicate()
        assert process.returncode == 2, said
        assert "a global batch of 33 does not divide by 2 ranks; give --batch-size 32 or 34" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("late", [0, 1, 2])
def test_ranks_meet_those_that_are_here_now(late: int) -> None:
    """Three starts with one store, as torchrun restarts: each time all agree on a name that was not there before."""
    store, names = HashStore(), []
    for _ in range(3):

        def meet(rank: int) -> str:
            time.sleep(0.3 * (rank == late))
            return _rendezvous_prefix(store, rank, 3)

        with ThreadPoolExecutor(3) as pool:
            met = set(pool.map(meet, range(3)))
        assert len(met) == 1
        names += met
    assert len(set(names)) == 3


def test_connections_that_do_not_close_hold_nobody(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As NCCL's do after captured collectives in pytorch issue 115388."""
    never = threading.Event()
    monkeypatch.setattr(dist, "destroy_process_group", never.wait)
    began = time.monotonic()
    distributed._close_connections()
    assert time.monotonic() - began < distributed.CLOSE_TIMEOUT_S + 1
    assert "did not close" in capsys.readouterr().err
    never.set()
