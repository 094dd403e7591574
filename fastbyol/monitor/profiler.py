"""Profile of ten steps of a run: a trace for the browser and a table of the costliest operations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WARM_UP = 10  # steps before the trace, in which graphs are captured, cuDNN chooses algorithms and memory is allocated
STEPS = 10
TRACER_WARM_UP = 2  # last steps of the warm-up, traced and dropped: they contain the tracer's own start
TABLE_ROWS = 40


class Profile:
    """A profile of steps WARM_UP to WARM_UP + STEPS of a loop that calls step() after each; a context manager.

    Writes `folder`/trace.json (for chrome://tracing or ui.perfetto.dev) and operations.txt after the last of them.
    Failures, a full disk or a loop that ends too soon, go to `warn`; none raises.
    """

    def __init__(self, folder: Path, *, device: str, warn: Callable[[str], None]) -> None:
        self._folder, self._warn = folder, warn
        self._sort_by = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
        self._profiler = profile(
            activities=activities,
            schedule=schedule(wait=WARM_UP - TRACER_WARM_UP, warmup=TRACER_WARM_UP, active=STEPS, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
        )
        self._steps = 0

    def step(self) -> None:
        """Advance the profiler after a step."""
        if self._steps < WARM_UP + STEPS:
            self._steps += 1
            self._profiler.step()

    def _write(self, profiler: profile) -> None:
        if self._steps < WARM_UP + STEPS:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._export(profiler)
            table = profiler.key_averages().table(sort_by=self._sort_by, row_limit=TABLE_ROWS)
            heading = f"{STEPS} steps, torch {torch.__version__}; sums over all of them\n"
            (self._folder / "operations.txt").write_text(heading + table)
        except (OSError, RuntimeError) as error:
            self._warn(f"the profile could not be written to {self._folder}: {error}")

    def _export(self, profiler: profile) -> None:
        """Write trace.json; raise OSError on a failure, which torch only prints."""
        trace = self._folder / "trace.json"
        trace.unlink(missing_ok=True)
        profiler.export_chrome_trace(str(trace))
        if not trace.exists():
            trace.with_name("trace.json.tmp").unlink(missing_ok=True)  # torch leaves the unfinished file
            raise OSError("trace.json could not be written; is the disk full?")

    def __enter__(self) -> Profile:
        self._profiler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._profiler.stop()
        if self._steps < WARM_UP + STEPS:
            self._warn(
                f"no profile was written: the run took {self._steps} of the {WARM_UP + STEPS} steps that --profile "
                "needs; give a longer --budget or more --epochs"
            )
