"""Laws of the starvation monitor: silent while data come, right about the cause when they do not."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from fastbyol.beton import JPEG, Reader, StoredImage
from fastbyol.data_prep.writer import Writer
from fastbyol.loaders.native import load
from fastbyol.monitor.metrics import Intervals
from fastbyol.monitor.starvation import (
    ROWS,
    STALLED,
    StarvationMonitor,
    Utilization,
    advice,
    utilization,
    utilization_over,
)
from fastbyol.order import stream
from fastbyol.system.limits import available_cores
from fastbyol.system.usage import Usage, usage

IDLE = Utilization(waiting=0.4, cores_busy=0.3, cores_busy_by_us=0.3, stalled=0.0, faults_per_image=0.0)


@pytest.mark.parametrize("seen", [IDLE, replace(IDLE, cores_busy=1.0), replace(IDLE, faults_per_image=9.0)])
def test_nothing_is_said_while_less_than_a_tenth_is_lost(seen: Utilization) -> None:
    assert advice(replace(seen, waiting=0.1), threads=1, cores=8, loader="native") is None
    assert advice(replace(seen, waiting=0.11), threads=1, cores=8, loader="native") is not None


@pytest.mark.parametrize(
    ("seen", "threads", "remedy"),
    [
        (replace(IDLE, cores_busy=0.97, cores_busy_by_us=0.9), 8, "smaller --max-side"),
        (replace(IDLE, cores_busy=0.97, cores_busy_by_us=0.2), 8, "other processes"),
        (replace(IDLE, faults_per_image=1.5), 2, "local disk"),
        (replace(IDLE, stalled=0.5), 2, "local disk"),
        (replace(IDLE, faults_per_image=1.5, cores_busy=1.0, cores_busy_by_us=1.0), 2, "smaller --max-side"),
        (IDLE, 2, "--workers 8"),
        (IDLE, 8, "give --loader memory, or give a larger --prefetch"),
        (IDLE, None, "give --loader memory, or give a larger --prefetch"),
    ],
)
def test_each_cause_has_its_remedy(seen: Utilization, threads: int | None, remedy: str) -> None:
    said = advice(seen, threads=threads, cores=8, loader="native")
    assert said is not None
    assert remedy in said
    assert "40 % of the training time is lost" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    "seen", [IDLE, replace(IDLE, stalled=1.0), replace(IDLE, cores_busy=1.0, cores_busy_by_us=1.0)]
)
def test_no_one_is_told_to_take_the_loader_he_has(seen: Utilization) -> None:
    assert "--loader memory" not in str(advice(seen, threads=None, cores=8, loader="memory"))


def test_shares_are_of_the_time_the_cores_and_the_images_between_two_readings() -> None:
    machine = os.cpu_count() or 1
    before = Usage(at_s=10.0, cpu_s=5.0, machine_cpu_s=50.0, major_faults=100, stalled_s=1.0)
    after = Usage(at_s=20.0, cpu_s=13.0, machine_cpu_s=50.0 + 9.0 * machine, major_faults=140, stalled_s=4.0)
    seen = utilization(before, after, wait_s=2.0, loop_s=8.0, images=80, cores=2)
    assert seen == Utilization(
        waiting=0.25, cores_busy=pytest.approx(0.9), cores_busy_by_us=0.4, stalled=0.3, faults_per_image=0.5
    )


def test_readings_follow_the_cpu_time_of_this_process() -> None:
    before = usage()
    began = time.process_time()
    while time.process_time() - began < 0.2:
        pass
    after = usage()
    assert after.cpu_s - before.cpu_s == pytest.approx(0.2, abs=0.05)
    assert after.machine_cpu_s - before.machine_cpu_s > 0.1


def test_ranks_share_the_cores_and_the_images() -> None:
    monitors = [StarvationMonitor(threads=1, loader="native", local_ranks=ranks) for ranks in (1, 2, 1000)]
    assert [monitor.cores for monitor in monitors] == [available_cores(), max(available_cores() // 2, 1), 1]
    before, after = (Usage(at_s, at_s, at_s, major_faults=int(at_s), stalled_s=0.0) for at_s in (0.0, 32.0))
    row = {"loader_wait_share": 0.5, "interval_s": 1.0, "images_per_s": 64.0}
    alone, shared = (utilization_over([(before, row), (after, row)], cores=1, ranks=ranks) for ranks in (1, 8))
    assert (alone.faults_per_image, shared.faults_per_image) == (0.5, 4.0)
    assert alone.waiting == shared.waiting == 0.5


def test_a_file_read_from_disk_faults_and_one_in_memory_does_not(tmp_path: Path) -> None:
    path = tmp_path / "cold"
    path.write_bytes(os.urandom(1 << 24))

    def faults() -> int:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            before = usage().major_faults
            assert len({data[place] for place in range(0, len(data), 4096)}) > 1
            return usage().major_faults - before

    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    cold = faults()
    if cold == 0:
        pytest.skip("this file system lies in memory")
    assert faults() < cold / 10  # a machine short of memory may have taken a page or two back


def rows(wait_s: float, *, count: int) -> Iterator[dict[str, float]]:
    for _ in range(count):
        yield {"loader_wait_share": wait_s, "interval_s": 1.0, "images_per_s": 64.0}


def test_a_run_is_warned_once_and_not_for_how_it_began() -> None:
    monitor = StarvationMonitor(threads=2, loader="native")
    assert [monitor.update(row) for row in (*rows(0.9, count=1), *rows(0.05, count=3 * ROWS))] == [None] * (
        3 * ROWS + 1
    )
    said = [monitor.update(row) for row in rows(0.5, count=3 * ROWS)]
    assert sum(text is not None for text in said) == 1


@pytest.mark.alone
def test_one_decoding_thread_before_idle_cores_is_told_to_be_more(tmp_path: Path) -> None:
    cores = available_cores()
    if cores < 2:
        pytest.skip("needs two cores")
    pixels = np.random.default_rng(0).integers(0, 256, (640, 640, 3), dtype=np.uint8)
    jpeg = StoredImage(JPEG, 640, 640, simplejpeg.encode_jpeg(pixels, quality=90))
    with Writer(tmp_path / "large.beton", capacity=8, class_names=None) as writer:
        for _ in range(8):
            writer.append(jpeg, label=None)
    monitor, intervals, said = StarvationMonitor(threads=1, loader="native"), Intervals(), None
    first = usage()
    with Reader(tmp_path / "large.beton") as reader:
        batches = load(reader, stream(0, batch_size=4, count=8, seed=0), workers=1)
        for _, batch in zip(range(ROWS + 2), batches, strict=False):
            intervals.lap("loader_wait_s")
            time.sleep(0.002)  # a GPU's step: the host's cores are free
            intervals.lap("step_s")
            intervals.images += len(batch.indices)
            said = said or monitor.update(intervals.take())
        batches.close()
    last = usage()
    others = (last.machine_cpu_s - first.machine_cpu_s) - (last.cpu_s - first.cpu_s)
    if others / (last.at_s - first.at_s) > 0.25 * (os.cpu_count() or 1):
        pytest.skip("other processes keep this machine's cores busy")
    if last.stalled_s - first.stalled_s > STALLED / 2 * (last.at_s - first.at_s):
        pytest.skip("other processes keep this machine's disk busy")
    assert said is not None
    assert f"--workers {cores}" in said
