"""Laws of interrupted runs: exact resume, answered signals, budgets kept from start to exit."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from fastbyol.beton import Reader
from fastbyol.cli import eval as evaluation
from fastbyol.cli.train import main
from fastbyol.evaluate import features, quality
from fastbyol.loaders import native
from fastbyol.loaders.batch import Batch
from fastbyol.monitor.metrics import read_metrics
from fastbyol.storage import checkpoint
from fastbyol.storage.run_folder import RunFolder
from fastbyol.system import signals
from fastbyol.train.inputs import Pipeline
from fastbyol.train.scoring import MEASURES
from tests.conftest import Betons, write_beton
from tests.support import soak
from tests.support.commands import Fork, wait_until
from tests.support.runs import arguments, encoders_are_equal, learned

BUDGET_S = 30.0  # of 18 s busy cores left 1.6 s unused; 7 % may be


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


def test_a_score_that_a_signal_cut_short_is_taken_by_the_resumed_run(
    betons: Betons, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = arguments(betons, tmp_path / "run", f"--val={betons.val}", "--epochs=3", "--warmup-epochs=1")
    represent, calls = features.represent, []

    def interrupted(*given: Any, **how: Any) -> features.Features:
        calls.append(given)
        if len(calls) == 5:  # four of the rehearsal came before: bank and queries, and those of raw pixels
            signal.raise_signal(signal.SIGTERM)
        return represent(*given, **how)

    monkeypatch.setattr(features, "represent", interrupted)
    asked += ["--knn-at=0.5"]
    assert main(asked) == 75
    rows = read_metrics(RunFolder(tmp_path / "run").metrics)
    assert [row["step"] for row in rows if "score_s" in row] == [8]
    assert main([*asked, "--resume"]) == 0
    rows = read_metrics(RunFolder(tmp_path / "run").metrics)
    assert [row["step"] for row in rows if "knn_top1" in row] == [10, 15]
    assert encoders_are_equal(finished, tmp_path / "run")


def test_the_measures_that_a_signal_cut_off_after_knn_are_taken_by_the_resumed_run(
    betons: Betons, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = arguments(betons, tmp_path / "run", f"--val={betons.val}", "--epochs=3", "--warmup-epochs=1")
    represent_pairs, calls = quality.represent_pairs, []

    def interrupted(*given: Any, **how: Any) -> tuple[Tensor, Tensor]:
        calls.append(given)
        if len(calls) == 2:  # the first is of the rehearsal
            signal.raise_signal(signal.SIGTERM)
        return represent_pairs(*given, **how)

    monkeypatch.setattr(quality, "represent_pairs", interrupted)
    asked += ["--knn-at=0.5"]
    assert main(asked) == 75
    rows = read_metrics(RunFolder(tmp_path / "run").metrics)
    assert [row["step"] for row in rows if "knn_top1" in row] == [8]
    assert main([*asked, "--resume"]) == 0
    rows = read_metrics(RunFolder(tmp_path / "run").metrics)
    assert [row["step"] for row in rows if set(MEASURES) <= row.keys()] == [10, 15]
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
            for after_s in (1.0, 3.5):  # by the first, what was decoded in advance is used up
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


@pytest.fixture
def stopped(betons: Betons, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Stop a run on a copy of the training file; return its folder and the copy."""
    data, out, batches = tmp_path / "copy.beton", tmp_path / "run", Pipeline.batches
    for suffix in ("", ".json"):
        shutil.copy(f"{betons.train}{suffix}", f"{data}{suffix}")

    def stopping(pipeline: Pipeline, start: int) -> Iterator[Batch]:
        for number, batch in enumerate(batches(pipeline, start), start):
            if number == 6:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patched:
        patched.setattr(Pipeline, "batches", stopping)
        assert main([*arguments(betons._replace(train=data), out, "--epochs=3", "--warmup-epochs=1")]) == 75
    return out, data


def test_the_same_images_elsewhere_resume_and_others_in_their_place_do_not(
    betons: Betons, stopped: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = stopped
    data.unlink()
    write_beton(data, 160, split="val")  # as many other images, under the same name
    asked = [*arguments(betons, out, "--epochs=3", "--warmup-epochs=1"), "--resume", "--log-every=2"]
    assert main([word.replace(str(betons.train), str(data)) for word in asked]) == 2
    assert "copy.beton holds other images than the run began with" in capsys.readouterr().err
    assert main([*asked, f"--val={betons.val}", "--loader=memory", "--on-error=skip"]) == 0
    assert RunFolder(out).read_config().data == str(betons.train)


def test_images_that_went_bad_are_skipped_by_the_resumed_run(betons: Betons, stopped: tuple[Path, Path]) -> None:
    out, data = stopped
    with Reader(data) as reader:
        place = int(reader.offsets[17])
    with data.open("r+b") as file:
        file.seek(place)
        file.write(bytes(200))
    asked = arguments(betons._replace(train=data), out, "--epochs=3", "--warmup-epochs=1", "--resume")
    assert main(asked) == 2
    assert main([*asked, "--on-error=skip"]) == 0
    scored = ["knn", str(out), f"--train={data}", f"--val={betons.val}"]
    assert evaluation.main(scored) == 2
    assert evaluation.main([*scored, "--on-error=skip"]) == 0


@pytest.mark.parametrize("stopped_at", [2, 7])
def test_a_run_on_images_kept_small_resumes_bit_equal_in_its_first_epoch_and_later(
    betons: Betons, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_at: int
) -> None:
    """An epoch has five steps: the resumed run decodes again what the stopped one held."""
    batches = Pipeline.batches
    small = ("--loader=memory", "--memory-side=20", "--epochs=3", "--warmup-epochs=1")

    def stopping(pipeline: Pipeline, start: int) -> Iterator[Batch]:
        for number, batch in enumerate(batches(pipeline, start), start):
            assert batch.sizes.tolist() == [[20, 20]] * 32
            if number == stopped_at:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    assert main(arguments(betons, tmp_path / "whole", *small)) == 0
    asked = arguments(betons, tmp_path / "parts", *small)
    with monkeypatch.context() as patched:
        patched.setattr(Pipeline, "batches", stopping)
        assert main(asked) == 75
    assert main([*asked, "--resume"]) == 0
    assert encoders_are_equal(tmp_path / "whole", tmp_path / "parts")
    assert learned(tmp_path / "whole") == learned(tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["vicreg", "coding-rate"])
def test_a_run_without_target_and_negatives_resumes_bit_equal(
    betons: Betons, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    batches = Pipeline.batches
    recipe = f"demo+loss={loss}+target=online+predictor_depth=0"

    def stopping(pipeline: Pipeline, start: int) -> Iterator[Batch]:
        for number, batch in enumerate(batches(pipeline, start), start):
            if number == 4:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    def asked(name: str) -> list[str]:
        return [recipe, *arguments(betons, tmp_path / name, "--epochs=2", "--warmup-epochs=1")[1:]]

    assert main(asked("whole")) == 0
    with monkeypatch.context() as patched:
        patched.setattr(Pipeline, "batches", stopping)
        assert main(asked("parts")) == 75
    assert main([*asked("parts"), "--resume"]) == 0
    assert encoders_are_equal(tmp_path / "whole", tmp_path / "parts")
    assert learned(tmp_path / "whole") == learned(tmp_path / "parts")


def test_a_resumed_run_keeps_the_side_of_its_images(
    betons: Betons, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    RunFolder(out).result.unlink()
    asked = arguments(betons, out, f"--val={betons.val}", "--epochs=3", "--warmup-epochs=1", "--resume")
    assert main([*asked, "--loader=memory", "--memory-side=20"]) == 2
    assert "memory_side was None, is 20; give the old settings" in capsys.readouterr().err


def test_a_finished_run_is_not_run_again(betons: Betons, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = RunFolder(finished).result.stat().st_mtime_ns
    asked = arguments(betons, finished, f"--val={betons.val}", "--epochs=3", "--warmup-epochs=1")
    assert main([*asked, "--resume"]) == 0
    assert "already finished" in capsys.readouterr().err
    assert RunFolder(finished).result.stat().st_mtime_ns == before


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


@pytest.mark.parametrize(
    "disturbance", ["none", *(pytest.param(name, marks=pytest.mark.slow) for name in ("late thieves", "pause"))]
)
def test_a_budget_is_kept_from_process_start_to_exit(betons: Betons, tmp_path: Path, disturbance: str) -> None:
    out = tmp_path / "run"
    more = ("--knn-at=0.5",) if disturbance == "none" else ()
    row = soak.keep_budget(betons.train.parent, out, *more, budget_s=BUDGET_S, disturbance=disturbance)
    assert soak.is_kept(row), row
    result = json.loads(RunFolder(out).result.read_text())
    assert result["budget_s"] == BUDGET_S
    assert result["knn_top1"] is not None or disturbance == "late thieves"
    assert result["elapsed_s"] <= row["wall_s"] + 0.1
