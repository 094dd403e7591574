"""Laws of what a run tells: no row is lost or doubled, no disk ends it, every share is a share."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fastbyol.errors import ConfigError
from fastbyol.monitor.logger import Telemetry, describe
from fastbyol.monitor.metrics import Intervals, extend_last_row, peak_gib, read_metrics
from fastbyol.monitor.tensorboard import scalars
from fastbyol.system.device import Idle
from tests.monitor.test_tensorboard import read
from tests.support.full_disk import files_end_at


def row(step: int, **more: Any) -> dict[str, Any]:
    """Make a row as the loop does, as far as the display needs it."""
    return {
        "step": step,
        "epoch": step / 10,
        "progress": step / 100,
        "elapsed_s": float(step),
        "loss": 4.0 / step,
        "images_per_s": 100.0,
        **more,
    }


def tell(path: Path, steps: range, *, from_step: int = 0, tensorboard: Path | None = None) -> None:
    """Write a row for each step."""
    with Telemetry(path, from_step=from_step, tensorboard=tensorboard) as telemetry:
        for step in steps:
            telemetry.write_row(row(step), left_s=1.0)


def test_resume_drops_the_rows_it_writes_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tell(path, range(1, 8))
    tell(path, range(4, 6), from_step=3)
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4, 5]
    tell(path, range(1, 3), from_step=0)
    assert [r["step"] for r in read_metrics(path)] == [1, 2]


def test_the_last_row_is_extended_and_stays_whole_on_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.touch()
    assert extend_last_row(path, {"rankme": 5.0}) is None
    tell(path, range(1, 4))
    before = path.read_bytes()
    with files_end_at(len(before) + 5), pytest.raises(OSError, match=r"space|large"):
        extend_last_row(path, {"rankme": 5.0})
    assert path.read_bytes() == before
    for value in (123.456789, 7.0):  # twice, as a run that is killed in its closing work does; the second is shorter
        assert extend_last_row(path, {"rankme": value}) == 3
        assert read_metrics(path) == [row(1), row(2), row(3, rankme=value)]
        assert path.read_bytes().endswith(b"}\n")


def test_a_line_cut_short_by_a_kill_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tell(path, range(1, 4))
    path.write_bytes(path.read_bytes() + b'{"step": 4, "lo')
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]
    tell(path, range(4, 6), from_step=3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_a_damaged_line_in_the_middle_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl holds a line that is not JSON"):
        read_metrics(path)


def test_tensorboard_shows_the_rows(tmp_path: Path) -> None:
    tell(tmp_path / "metrics.jsonl", range(1, 8), tensorboard=tmp_path / "tensorboard")
    tell(tmp_path / "metrics.jsonl", range(4, 6), from_step=3, tensorboard=tmp_path / "tensorboard")
    rows = read_metrics(tmp_path / "metrics.jsonl")
    shown = read(tmp_path / "tensorboard")
    assert shown["learning/loss"] == [(r["step"], pytest.approx(r["loss"])) for r in rows]
    assert shown.keys() == scalars(rows[0]).keys()


def test_scores_stand_under_their_own_names_in_tensorboard() -> None:
    row = {"step": 3, "loss": 1.0, "knn_top1": 40.0, "probe_top1": 30.0, "probe_loss": 2.0, "threads": 2}
    assert list(scalars(row)) == [
        "learning/loss",
        "scores/knn_top1",
        "scores/probe_top1",
        "scores/probe_loss",
        "machine/threads",
    ]


def test_a_full_disk_costs_a_warning_and_no_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    with Telemetry(path, from_step=0, tensorboard=tmp_path / "tensorboard") as telemetry:
        with files_end_at(500):
            for step in range(1, 21):
                telemetry.write_row(row(step), left_s=1.0)
        assert 0 < len(read_metrics(path)) < 20
        telemetry.write_row(row(21), left_s=1.0)
    rows = read_metrics(path)
    assert [r["step"] for r in rows] == list(range(1, 22))
    assert [step for step, _ in read(tmp_path / "tensorboard")["learning/loss"]] == list(range(1, 22))
    assert capsys.readouterr().err.count("its rows are buffered") == 2  # one for each file
    assert sum(len(r.get("warnings", ())) for r in rows) == 2


def test_a_warning_is_said_at_once_and_kept_in_the_next_row_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    with Telemetry(path, from_step=0) as telemetry:
        telemetry.write_row(row(1), left_s=1.0)
        telemetry.warn("the sky is falling")
        assert "warning: the sky is falling\n" in capsys.readouterr().err
        telemetry.write_row(row(2), left_s=1.0)
        telemetry.write_row(row(3), left_s=1.0)
    assert [r.get("warnings") for r in read_metrics(path)] == [None, ["the sky is falling"], None]


def test_warnings_before_the_first_row_and_after_the_last_are_not_lost(tmp_path: Path) -> None:
    pending_warnings = ["a checkpoint is damaged"]
    with Telemetry(tmp_path / "metrics.jsonl", from_step=0, pending_warnings=pending_warnings) as telemetry:
        telemetry.write_row(row(1), left_s=1.0)
        telemetry.warn("the last checkpoint could not be written")
    assert [r.get("warnings") for r in read_metrics(tmp_path / "metrics.jsonl")] == [["a checkpoint is damaged"]]
    assert pending_warnings == ["the last checkpoint could not be written"]


def test_a_further_sink_gets_every_row_and_is_closed(tmp_path: Path) -> None:
    class Heard:
        def __init__(self) -> None:
            self.steps: list[int] = []
            self.is_closed = False

        def write(self, row: dict[str, Any]) -> None:
            self.steps.append(row["step"])

        def close(self) -> None:
            self.is_closed = True

    heard = Heard()
    with Telemetry(tmp_path / "metrics.jsonl", from_step=0, extra_sink=heard) as telemetry:
        telemetry.write_row(row(1), left_s=1.0)
        telemetry.write_row(row(2), left_s=1.0)
    assert heard.steps == [1, 2]
    assert heard.is_closed


def test_intervals_account_for_waiting_as_a_share() -> None:
    intervals = Intervals()
    time.sleep(0.03)
    intervals.lap("loader_wait_s")
    time.sleep(0.01)
    intervals.lap("step_s")
    intervals.images += 8
    taken = intervals.take()
    assert taken["loader_wait_s"] >= 0.03  # a sleep may last longer, never shorter
    assert taken["step_s"] >= 0.01
    assert taken["loader_wait_s"] + taken["step_s"] <= taken["interval_s"]
    assert 0 < taken["loader_wait_share"] < 1
    assert taken["loader_wait_share"] == pytest.approx(taken["loader_wait_s"] / taken["interval_s"])
    assert taken["images_per_s"] == pytest.approx(8 / taken["interval_s"])
    assert intervals.take()["loader_wait_share"] == 0.0


def test_cpu_seconds_leave_out_what_the_interval_leaves_out() -> None:
    def busy(seconds: float) -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    intervals = Intervals()
    busy(0.03)
    intervals.lap("step_s")
    busy(0.2)
    intervals.skip()
    busy(0.02)
    assert 0.05 <= intervals.take()["cpu_s"] < 0.2
    assert intervals.take()["cpu_s"] < 0.05


def test_waiting_while_the_gpu_computes_loses_nothing() -> None:
    intervals = Intervals()
    time.sleep(0.03)
    assert intervals.lap("loader_wait_s") >= 0.03
    taken = intervals.take(gpu_idle=Idle(idle_s=0.02, waiting_s=0.01))
    assert taken["loader_wait_share"] == pytest.approx(0.01 / taken["interval_s"])
    assert taken["gpu_idle_share"] == pytest.approx(0.02 / taken["interval_s"])


def test_peak_memory_is_what_the_kernel_says() -> None:
    status = Path("/proc/self/status").read_text()
    kib = int(status.split("VmHWM:")[1].split()[0])
    assert peak_gib("cpu") == pytest.approx(kib / 2**20, rel=0.05)


def test_peak_memory_is_not_that_of_who_began_the_process() -> None:
    own = "from fastbyol.monitor.metrics import peak_gib; print(peak_gib('cpu'))"
    began_by = f"import os, sys; b'x' * (1 << 30); os.execv(sys.executable, [sys.executable, '-c', {own!r}])"
    said = subprocess.run([sys.executable, "-c", began_by], check=True, capture_output=True, text=True).stdout
    assert 0 < float(said) < 0.9


def test_the_line_says_what_the_row_holds_and_nothing_else() -> None:
    assert describe(row(2), left_s=95) == "step 2  epoch 0.20  loss 2.000  100 images/s  1m35s left"
    full = describe(row(2, loader_wait_share=0.123, mfu=0.4, peak_gib=1.26), left_s=5)
    assert full == "step 2  epoch 0.20  loss 2.000  100 images/s  12 % waiting  40 % MFU  1.3 GiB  5s left"
