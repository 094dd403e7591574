"""Laws of fastbyol-train: exact resume, on time, exact ends, one clear line for every wrong input."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastbyol.cli.train import main
from fastbyol.evaluate import features
from fastbyol.loaders import native
from fastbyol.loaders.batch import Batch
from fastbyol.monitor.metrics import LAPS, read_metrics
from fastbyol.storage import checkpoint
from fastbyol.storage.run_folder import RunFolder, lock
from fastbyol.system import signals
from fastbyol.train.inputs import Pipeline
from tests.conftest import Betons, write_beton
from tests.support import soak
from tests.support.commands import Fork, wait_until

BUDGET_S = 18.0  # start-up and rehearsal of a busy machine leave some of it
TRAIN = (sys.executable, "-m", "fastbyol.train")


def arguments(betons: Betons, out: Path, *more: str) -> list[str]:
    return ["demo", f"--data={betons.train}", f"--out={out}", "--batch-size=32", "--log-every=1", "--device=cpu", *more]


def encoders_are_equal(a: Path, b: Path) -> bool:
    first, second = (load_file(RunFolder(out).encoder) for out in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def learned(out: Path) -> list[dict[str, Any]]:
    """Give the rows of a run without what the clock wrote into them."""
    timed = (
        "elapsed_s",
        "images_per_s",
        "interval_s",
        "loader_wait_s",
        "loader_wait_share",
        "views_s",
        "step_s",
        "agree_s",
        "log_s",
        "score_s",
        "checkpoint_s",
        "peak_gib",
        "mfu",
        "warnings",
    )
    return [{name: row[name] for name in row if name not in timed} for row in read_metrics(RunFolder(out).metrics)]


@pytest.fixture(scope="module")
def finished(betons: Betons, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train three epochs without interruption."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main(arguments(betons, out, f"--val={betons.val}", "--epochs=3", "--warmup-epochs=1")) == 0
    return out


def test_a_run_leaves_its_whole_folder(finished: Path) -> None:
    folder = RunFolder(finished)
    result = json.loads(folder.result.read_text())
    assert result["steps"] == 15
    assert result["images"] == 480
    assert result["epochs"] == 3.0
    assert 0 <= result["knn_top1"] <= 100
    assert 0 <= result["knn_top1_random_init"] <= 100
    assert result["images_per_s"] > 0
    assert folder.encoder.is_file()
    assert folder.read_config().epochs == 3.0
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step-000000015.pt"]


def test_the_last_row_stands_at_progress_one_rate_zero_tau_one(finished: Path) -> None:
    rows = read_metrics(RunFolder(finished).metrics)
    assert [row["step"] for row in rows] == list(range(1, 16))
    assert (rows[-1]["progress"], rows[-1]["lr"], rows[-1]["tau"]) == (1.0, 0.0, 1.0)
    assert rows[4]["lr"] == max(row["lr"] for row in rows)  # one epoch of warm-up is five steps


def test_rows_tell_the_online_probe_of_a_labelled_file(betons: Betons, finished: Path, tmp_path: Path) -> None:
    for row in read_metrics(RunFolder(finished).metrics):
        assert row["probe_loss"] > 0
        assert 0 <= row["probe_top1"] <= 100
    asked = ["demo", f"--data={betons.unlabelled}", f"--out={tmp_path / 'run'}", "--batch-size=32", "--device=cpu"]
    assert main([*asked, "--epochs=1", "--warmup-epochs=0"]) == 0
    assert "probe_loss" not in read_metrics(RunFolder(tmp_path / "run").metrics)[-1]


def test_rows_account_for_the_time_of_the_loop(finished: Path) -> None:
    for row in read_metrics(RunFolder(finished).metrics):
        parts = sum(row[name] for name in LAPS)
        assert 0.5 * row["interval_s"] < parts <= row["interval_s"]


def test_the_report_is_one_page_that_needs_nothing(finished: Path) -> None:
    page = RunFolder(finished).report.read_text()
    assert page.count("<svg") == 7
    assert "data:image/png;base64," in page
    assert not re.search(r"src=.http|<script|<link|@import", page)


def test_the_same_seed_trains_the_same_encoder(betons: Betons, finished: Path, tmp_path: Path) -> None:
    assert main(arguments(betons, tmp_path / "run", "--epochs=3", "--warmup-epochs=1", "--workers=1")) == 0
    assert encoders_are_equal(finished, tmp_path / "run")


@pytest.fixture
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads_as_before")
@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.alone)])  # two wait where a core is taken
def test_a_given_number_of_threads_trains_the_same_encoder_each_time(
    betons: Betons, tmp_path: Path, threads: int
) -> None:
    for name in ("first", "again"):
        asked = arguments(betons, tmp_path / name, "--epochs=2", "--warmup-epochs=1", f"--threads={threads}")
        assert main(asked) == 0
        assert torch.get_num_threads() == threads
    assert encoders_are_equal(tmp_path / "first", tmp_path / "again")


def test_scores_in_the_midst_of_training_change_nothing(betons: Betons, finished: Path, tmp_path: Path) -> None:
    asked = arguments(betons, tmp_path / "run", f"--val={betons.val}", "--epochs=3", "--warmup-epochs=1")
    assert main([*asked, "--knn-at=0.8,0.4", "--log-every=5"]) == 0
    assert encoders_are_equal(finished, tmp_path / "run")
    rows = {row["step"]: row for row in read_metrics(RunFolder(tmp_path / "run").metrics)}
    assert sorted(rows) == [5, 6, 10, 12, 15]
    assert [step for step, row in rows.items() if "knn_top1" in row] == [6, 12]
    assert "kNN top-1" in RunFolder(tmp_path / "run").report.read_text()


def test_a_score_that_a_signal_cut_short_is_taken_by_the_resumed_run(
    betons: Betons, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = arguments(betons, tmp_path / "run", f"--val={betons.val}", "--epochs=3", "--warmup-epochs=1")
    represent, calls = features.represent, []

    def interrupted(*given: Any, **how: Any) -> features.Features:
        calls.append(given)
        if len(calls) == 4:  # three of the rehearsal came before
            signal.raise_signal(signal.SIGTERM)
        return represent(*given, **how)

    monkeypatch.setattr(features, "represent", interrupted)
    asked += ["--knn-at=0.5"]
    assert main(asked) == 75
    rows = read_metrics(RunFolder(tmp_path / "run").metrics)
    assert [row["step"] for row in rows if "score_s" in row] == [8]
    assert main([*asked, "--resume"]) == 0
    rows = read_metrics(RunFolder(tmp_path / "run").metrics)
    assert [row["step"] for row in rows if "knn_top1" in row] == [10]
    assert encoders_are_equal(finished, tmp_path / "run")


def test_a_signal_is_answered_while_no_images_come(
    betons: Betons, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = arguments(betons, tmp_path / "run", f"--val={betons.val}", "--epochs=3", "--warmup-epochs=1")
    checkpoints, batches, seen = RunFolder(tmp_path / "run").checkpoints, Pipeline.batches, []

    def stalling(pipeline: Pipeline, start: int) -> Iterator[Batch]:
        for number, batch in enumerate(batches(pipeline, start), start):
            if number == 3:
                signal.raise_signal(signal.SIGTERM)
                began = time.monotonic()
                while not checkpoint.exists(checkpoints) and time.monotonic() < began + 30:
                    time.sleep(0.05)
                seen.append(time.monotonic() - began)
            yield batch

    monkeypatch.setattr(Pipeline, "batches", stalling)
    assert main(asked) == 75
    assert seen[0] < 10
    monkeypatch.undo()
    assert main([*asked, "--resume"]) == 0
    assert encoders_are_equal(finished, tmp_path / "run")


def test_a_second_signal_ends_a_run_whose_disk_hangs(
    betons: Betons, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    decode, hung, calls = native.decode_part, threading.Event(), itertools.count()

    def hanging(*given: Any) -> Any:
        if next(calls) == 30:
            for after_s in (2.0, 6.0):  # by the first, what was decoded in advance is used up
                threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGTERM)).start()
            hung.wait(60)
        return decode(*given)

    monkeypatch.setattr(native, "decode_part", hanging)
    monkeypatch.setattr(signals, "STALL_S", 1.0)
    began = time.monotonic()
    assert main(arguments(betons, tmp_path / "run", "--epochs=30", "--warmup-epochs=1")) == 75
    assert time.monotonic() - began < 40
    assert "is saved; a second signal" in capsys.readouterr().err
    assert checkpoint.exists(RunFolder(tmp_path / "run").checkpoints)
    hung.set()


def test_a_terminal_that_goes_stops_a_run_unless_nohup_ignores_it() -> None:
    ask = "import signal; from fastbyol.system import signals; print(signal.SIGHUP in signals.active_stop_signals())"
    for ignored, expected in (("", "True"), ("trap '' HUP; ", "False")):
        asked = ["bash", "-c", f"{ignored}exec {shlex.join([sys.executable, '-c', ask])}"]
        assert subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip() == expected


def test_a_folder_has_one_run_at_a_time(betons: Betons, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = arguments(betons, tmp_path / "run", "--epochs=2", "--warmup-epochs=1")
    (tmp_path / "run").mkdir()
    with lock(RunFolder(tmp_path / "run")):
        assert main(asked) == 2
    said = capsys.readouterr().err
    assert "another process trains in" in said
    assert not list((tmp_path / "run").iterdir())
    assert main(asked) == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL])
def test_resume_after_a_signal_is_bit_equal(
    betons: Betons, finished: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "run"
    asked = arguments(betons, out, f"--val={betons.val}", "--epochs=3", "--warmup-epochs=1")
    process = Fork(tmp_path / "said", *asked, "--checkpoint-every=0.01s")
    wait_until(lambda: len(read_metrics(RunFolder(out).metrics)) >= 4, process)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == (-9 if number == signal.SIGKILL else 75), said
    assert not RunFolder(out).result.exists()
    assert main([*asked, "--resume"]) == 0
    assert encoders_are_equal(finished, out)
    assert learned(out) == learned(finished)


@pytest.mark.slow
@pytest.mark.parametrize("disturbance", ["none", "late thieves", "pause"])
def test_a_budget_is_kept_from_process_start_to_exit(betons: Betons, tmp_path: Path, disturbance: str) -> None:
    out = tmp_path / "run"
    more = ("--knn-at=0.5",) if disturbance == "none" else ()
    row = soak.keep_budget(betons.train.parent, out, *more, budget_s=BUDGET_S, disturbance=disturbance)
    assert soak.is_kept(row), row
    result = json.loads(RunFolder(out).result.read_text())
    assert result["budget_s"] == BUDGET_S
    assert result["knn_top1"] is not None or disturbance == "late thieves"
    assert result["elapsed_s"] <= row["wall_s"] + 0.1


def test_a_finished_run_is_not_run_again(betons: Betons, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = RunFolder(finished).result.stat().st_mtime_ns
    asked = arguments(betons, finished, f"--val={betons.val}", "--epochs=3", "--warmup-epochs=1")
    assert main([*asked, "--resume"]) == 0
    assert "already finished" in capsys.readouterr().err
    assert RunFolder(finished).result.stat().st_mtime_ns == before


def test_divergence_ends_with_status_3(betons: Betons, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = arguments(betons, tmp_path / "run", "--epochs=9", "--warmup-epochs=0", "--base-lr=1e30")
    assert main(asked) == 3
    assert "steps in a row" in capsys.readouterr().err
    assert not RunFolder(tmp_path / "run").result.exists()


def status_of(asked: list[str]) -> int:
    """Run fastbyol-train in this process, also when argparse ends it."""
    try:
        return main(asked)
    except SystemExit as end:
        return int(str(end.code))


def test_a_refused_overwrite_leaves_the_old_run(betons: Betons, finished: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in finished.iterdir()}
    assert main(arguments(betons, finished, "--budget=1s", "--overwrite")) == 2
    assert {path.name: path.stat().st_mtime_ns for path in finished.iterdir()} == before


def test_a_run_stopped_before_its_first_checkpoint_starts_anew(betons: Betons, finished: Path, tmp_path: Path) -> None:
    asked = arguments(betons, tmp_path / "run", f"--val={betons.val}", "--epochs=3", "--warmup-epochs=1")
    (tmp_path / "run").mkdir()
    RunFolder(tmp_path / "run").config.write_bytes(RunFolder(finished).config.read_bytes())
    assert main([*asked, "--resume"]) == 0
    assert encoders_are_equal(finished, tmp_path / "run")


def test_resume_refuses_data_that_changed(
    betons: Betons, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    data = write_beton(tmp_path / "train.beton", 150, split="train")
    config = RunFolder(tmp_path / "run").config
    config.write_text(config.read_text().replace(str(betons.train), str(data)))
    asked = arguments(betons, tmp_path / "run", f"--val={betons.val}", "--epochs=3", "--warmup-epochs=1", "--resume")
    assert main([argument.replace(str(betons.train), str(data)) for argument in asked]) == 2
    assert "holds 150 images; the run began with 160" in capsys.readouterr().err


@pytest.mark.slow
def test_a_full_disk_ends_with_one_clear_line(betons: Betons, tmp_path: Path) -> None:
    limited = f"ulimit -f 200; exec {shlex.join([*TRAIN, *arguments(betons, tmp_path / 'run', '--epochs=1')])}"
    ended = subprocess.run(["bash", "-c", limited + " --warmup-epochs=0"], capture_output=True, text=True, check=False)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("\n") == 1
    assert "fastbyol-train: error: " in ended.stderr
    assert not list((tmp_path / "run").iterdir())


def occupied(betons: Betons, tmp_path: Path) -> list[str]:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    return arguments(betons, tmp_path / "run")


def truncated(betons: Betons, tmp_path: Path) -> list[str]:
    (tmp_path / "cut.beton").write_bytes(betons.train.read_bytes()[:5000])
    return ["demo", f"--data={tmp_path / 'cut.beton'}", f"--out={tmp_path / 'run'}"]


def foreign(_: Betons, tmp_path: Path) -> list[str]:
    (tmp_path / "letter.beton").write_text("Dear Sir or Madam, " * 100)
    return ["demo", f"--data={tmp_path / 'letter.beton'}", f"--out={tmp_path / 'run'}"]


def other_classes(betons: Betons, tmp_path: Path) -> list[str]:
    val = write_beton(tmp_path / "v.beton", 20, split="val")
    sidecar = Path(f"{val}.json")
    sidecar.write_text(sidecar.read_text().replace('"class_names": [', '"class_names": ["zebra", ', 1))
    return arguments(betons, tmp_path / "run", f"--val={val}")


def unwritable(betons: Betons, tmp_path: Path) -> list[str]:
    (tmp_path / "file").touch()
    return arguments(betons, tmp_path / "file" / "run")


BAD = {
    "missing file": (lambda b, t: ["demo", f"--data={t / 'none.beton'}", f"--out={t / 'run'}"], "none.beton"),
    "a folder": (lambda b, t: ["demo", f"--data={t}", f"--out={t / 'run'}"], "folder|directory"),
    "not a beton": (foreign, "letter.beton"),
    "truncated beton": (truncated, "cut.beton"),
    "unwritable output": (unwritable, "file"),
    "unknown recipe": (lambda b, t: ["imagenet", f"--data={b.train}"], "imagenet_rn50"),
    "nothing at all": (lambda b, t: [], "RECIPE.*--help"),
    "unknown flag": (lambda b, t: [*arguments(b, t / "run"), "--bananas=8"], "--bananas=8"),
    "epochs in words": (lambda b, t: arguments(b, t / "run", "--epochs=many"), "--epochs"),
    "no data": (lambda b, t: ["cifar10_tiny"], "give --data"),
    "budget of bananas": (lambda b, t: arguments(b, t / "run", "--budget=8 bananas"), "8 bananas"),
    "budget too short": (lambda b, t: arguments(b, t / "run", "--budget=1s"), "longer --budget"),
    "endless epochs": (lambda b, t: arguments(b, t / "run", "--epochs=inf"), "epochs"),
    "endless rate": (lambda b, t: arguments(b, t / "run", "--base-lr=inf"), "base_lr"),
    "negative epochs": (lambda b, t: arguments(b, t / "run", "--epochs=-1"), "epochs"),
    "batch over dataset": (lambda b, t: arguments(b, t / "run", "--batch-size=161"), "160 images"),
    "batch of one": (lambda b, t: arguments(b, t / "run", "--batch-size=1"), "at least 2"),
    "unlabelled validation": (lambda b, t: arguments(b, t / "run", f"--val={b.unlabelled}"), "no labels"),
    "other classes": (other_classes, "different classes|sidecar"),
    "folder in use": (occupied, "--overwrite"),
    "budget in the past": (lambda b, t: arguments(b, t / "run", "--budget=until 2001-01-01"), "leaves no time"),
    "scores without labels": (lambda b, t: arguments(b, t / "run", "--knn-at=0.5"), "give --val"),
    "score at the end": (lambda b, t: arguments(b, t / "run", f"--val={b.val}", "--knn-at=0.5,1"), "knn_at has 1.0"),
    "scores in words": (lambda b, t: arguments(b, t / "run", "--knn-at=often"), "'often'.*0.25,0.5"),
    "budget of no job": (lambda b, t: arguments(b, t / "run", "--budget=slurm"), "outside a Slurm job"),
    "ramp above full size": (lambda b, t: arguments(b, t / "run", "--crop-ramp=24"), "24 px"),
    "micro-batches of one": (lambda b, t: arguments(b, t / "run", "--micro-batches=32"), "at least 2 images"),
    "unequal micro-batches": (lambda b, t: arguments(b, t / "run", "--micro-batches=3"), "3 equal micro-batches"),
    "micro-batches and lag": (lambda b, t: arguments(b, t / "run", "--micro-batches=2", "--lagged-target"), "lagged"),
    "resume with another seed": (lambda b, t: ["demo"], "seed was 0, is 7"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_clear_line_and_status_2(
    case: str, betons: Betons, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build, expected = BAD[case]
    command: Callable[[Betons, Path], list[str]] = build
    asked = command(betons, tmp_path)
    if case == "resume with another seed":
        asked = arguments(
            betons, finished, f"--val={betons.val}", "--epochs=3", "--warmup-epochs=1", "--resume", "--seed=7"
        )
    assert status_of(asked) == 2
    said = capsys.readouterr().err
    assert said.startswith("fastbyol-train: error: ")
    assert said.count("\n") == 1
    assert re.search(expected, said), said


def test_a_crop_ramp_in_bfloat16_runs_to_its_end(betons: Betons, tmp_path: Path) -> None:
    asked = arguments(betons, tmp_path / "run", "--epochs=2", "--warmup-epochs=1", "--crop-ramp=16")
    assert main([*asked, "--precision=bfloat16"]) == 0
    sizes = [row["crop_px"] for row in read_metrics(RunFolder(tmp_path / "run").metrics)]
    assert sizes == sorted(sizes)
    assert set(sizes) == {16, 20, 24}
    assert RunFolder(tmp_path / "run").result.exists()


@pytest.mark.slow
def test_a_run_out_of_time_is_closed_where_it_stands(betons: Betons, tmp_path: Path) -> None:
    out = tmp_path / "run"
    asked = arguments(betons, out, f"--val={betons.val}", "--checkpoint-every=0.01s")
    process = Fork(tmp_path / "said", *asked, "--budget=1h")
    wait_until(lambda: checkpoint.exists(RunFolder(out).checkpoints), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    state, _ = checkpoint.load_newest(RunFolder(out).checkpoints)
    assert main([*asked, "--budget=until 2001-01-01", "--resume"]) == 0
    result = json.loads(RunFolder(out).result.read_text())
    assert (result["progress"], result["steps"]) == (state["progress"], state["step"])
    assert 0 < result["progress"] < 0.1
