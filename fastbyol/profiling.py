"""Know how to profile ten steps of a run: a trace for a browser and a table of the costliest operations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WARM_UP = 10  # steps before: captures, cuDNN's choices and allocations are over
STEPS = 10
TRACED_AHEAD = 2  # last steps of the warm-up that are traced and dropped: the tracer's own start is in them
TABLE_ROWS = 40


class Profile:
    """Trace the steps from WARM_UP to WARM_UP + STEPS of a loop that calls step() after each; a context manager.

    Writes `folder`/trace.json (for chrome://tracing or ui.perfetto.dev) and operations.txt as soon as the last of them
    is done. What goes wrong, a full disk or a loop that ends too soon, is told to `warn` and raises nothing.
    """

    def __init__(self, folder: Path, *, device: str, warn: Callable[[str], None]) -> None:
        self._folder, self._warn = folder, warn
        self._sort_by = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
        self._profiler = profile(
            activities=activities,
            schedule=schedule(wait=WARM_UP - TRACED_AHEAD, warmup=TRACED_AHEAD, active=STEPS, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
        )
        self._steps = 0

    def step(self) -> None:
        """Take note that a step has ended."""
        if self._steps < WARM_UP + STEPS:
            self._steps += 1
            self._profiler.step()

    def _write(self, done: profile) -> None:
        if self._steps < WARM_UP + STEPS:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._export(done)
            table = done.key_averages().table(sort_by=self._sort_by, row_limit=TABLE_ROWS)
            heading = f"{STEPS} steps, torch {torch.__version__}; sums over all of them\n"
            (self._folder / "operations.txt").write_text(heading + table)
        except (OSError, RuntimeError) as error:
            self._warn(f"the profile could not be written to {self._folder}: {error}")

    def _export(self, done: profile) -> None:
        """Write trace.json; raise OSError where torch, which only prints it, could not."""
        trace = self._folder / "trace.json"
        trace.unlink(missing_ok=True)
        done.export_chrome_trace(str(trace))
        if not trace.exists():
            trace.with_name("trace.json.tmp").unlink(missing_ok=True)  # the part that torch leaves
            raise OSError("trace.json did not fit; is the disk full?")

    def __enter__(self) -> Profile:
        self._profiler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._profiler.stop()
        if self._steps < WARM_UP + STEPS:
            self._warn(
                f"no profile: the run took {self._steps} of the {WARM_UP + STEPS} steps that --profile needs; "
                "give a longer --budget or more --epochs"
            )
