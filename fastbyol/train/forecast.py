"""What a run would be, measured before it: its length, pace, memory, rates, disk and reserve; nothing is trained."""

from __future__ import annotations

import math
import shutil
from contextlib import suppress
from typing import Any

import torch

from fastbyol import schedule
from fastbyol.budget import Stopwatch, format_duration
from fastbyol.config import Config
from fastbyol.errors import ConfigError
from fastbyol.monitor.metrics import peak_gib
from fastbyol.recipe import CropRamp, Recipe
from fastbyol.schedule import Schedule
from fastbyol.storage.run_folder import RunFolder
from fastbyol.system.signals import StopSignal
from fastbyol.train import memory
from fastbyol.train.opening import open_run
from fastbyol.train.plan import Reserve
from fastbyol.train.planning import Planner
from fastbyol.train.runner import Run
from fastbyol.train.scoring import BASELINES

KEPT = 3  # checkpoints on disk at most: the two newest, and the one that is written
PIECES = {"evaluate": "score", "checkpoint": "checkpoint", "export": "encoder", "report": "report", "result": "result"}


def forecast(
    config: Config, folder: RunFolder, *, stopwatch: Stopwatch, stop: StopSignal, resume: bool, overwrite: bool
) -> dict[str, str]:
    """Rehearse the end of a run, measure its step, undo both, and describe the run in a few lines by name.

    On several ranks all take part, and rank 0's lines count. Raises what runner.run raises before a run begins.
    """
    is_new = not folder.path.exists()
    try:
        with open_run(config, folder, stopwatch=stopwatch, resume=resume, overwrite=overwrite) as opened:
            if opened.state == "finished":
                return {"length": "none: the run has finished"}
            run = Run(opened.config, opened, stopwatch=stopwatch, stop=stop)
            if opened.state == "started":
                run.resume()
            else:
                run.begin()
            lines = _describe(run)
            opened.world.from_main(None)  # no rank removes the folder while another looks at its disk
            return lines
    except RuntimeError as error:
        if memory.is_out_of_memory(error):
            raise ConfigError(
                "a step ran out of the GPU's memory; a run would go on in smaller micro-batches, so give a larger "
                "--micro-batches to plan with"
            ) from error
        raise
    finally:
        if is_new:
            with suppress(OSError):  # it holds what a run would need, such as the demo's images
                folder.path.rmdir()


def _describe(run: Run) -> dict[str, str]:
    planner = Planner(run.loop, run.closing, epochs=run.epochs, used_before_s=run.used_before_s)
    deadline_s = run.config.end_s(run.stopwatch.elapsed_at)
    if run.loop.position.progress >= 1.0:
        return {"length": "only the work at the end is left"}
    planned = planner.plan(deadline_s)
    if planned is None:
        return {"length": "no time is left to train"}
    _, schedules = planned
    plan: dict[str, Any] = run.loop.notes["plan"] if deadline_s is not None else {"step_s": planner.measure()}
    recipe, closing_s = run.config.recipe, plan.get("closing_s", run.closing.seconds)
    step_s = plan["step_s"] * schedule.relative_cost(recipe)
    return {
        "length": _length(run, plan, step_s),
        "speed": f"{1000 * step_s:.3g} ms a step, {recipe.batch_size / step_s:,.0f} images/s (measured)",
        "batch": _batch(run),
        "memory": _memory(run.config),
        "rates": _rates(schedules),
        "views": _views(recipe),
        "disk": _disk(run),
        "reserve": _reserve(closing_s, plan.get("reserve_s")),
        **_scores(run.loop.notes),
    }


def _length(run: Run, plan: dict[str, Any], step_s: float) -> str:
    """Describe epochs, steps and time; of a run by epochs the time is what its remaining steps and its end take."""
    batch, images = run.config.recipe.batch_size, len(run.loop.reader)
    if "epochs_that_fit" in plan:
        epochs, seconds = plan["epochs_that_fit"], plan["budget_s"]
    else:
        assert run.config.epochs is not None
        epochs = run.config.epochs
        steps = max(math.ceil(epochs * images / batch) - run.loop.position.step, 0)
        scores_s = run.loop.remaining_scores() * run.closing.seconds.get("evaluate", 0.0)
        seconds = run.stopwatch.elapsed_s() + steps * step_s + scores_s + Reserve(run.closing.seconds).seconds()
    steps = math.ceil(epochs * images / batch)
    return f"{epochs:.3g} epochs of {images:,} images, {steps:,} steps, in {format_duration(seconds)}"


def _batch(run: Run) -> str:
    config, ranks = run.config, run.world.ranks
    of_rank = f" on {ranks} ranks" if ranks > 1 else ""
    parts = f", each rank's in {config.parts} micro-batches" if config.parts > 1 else ""
    recomputed = ", some activations recomputed" if config.recomputes else ""
    return f"{config.recipe.batch_size} images{of_rank}{parts}{recomputed}"


def _memory(config: Config) -> str:
    peak = f"{peak_gib(config.device):.1f} GiB at most so far"
    if config.device == "cpu":
        return f"{peak}, on the CPU"
    return f"{peak}, of the GPU's {torch.cuda.mem_get_info()[1] / memory.GIB:.1f} GiB"


def _rates(schedules: Schedule) -> str:
    tau = f", tau {schedules.tau_base:.4g}{' to 1' if schedules.tau_rises else ''}"
    return (
        f"learning rate up to {schedules.peak_lr:.3g} (base {schedules.base_lr:.3g}), warm-up "
        f"{schedules.warmup:.1%} of the run{tau if schedules.objective.moves_target else ''}"
    )


def _views(recipe: Recipe) -> str:
    sizes = "; ".join(f"{count} of {px} px" for count, px in recipe.sizes_of_views(recipe.crop_px))
    return sizes if recipe.crop_ramp is None else f"{sizes}; {_ramp(recipe.crop_px, recipe.crop_ramp)}"


def _ramp(full_px: int, ramp: CropRamp) -> str:
    return f"{', '.join(map(str, ramp.sizes_px))} px up to {ramp.until:.0%} of the run, then {full_px} px"


def _disk(run: Run) -> str:
    """Describe what the run folder will hold, from the files of the rehearsal."""
    sizes = run.world.from_main(run.closing.bytes)  # rank 0 has rehearsed
    total = KEPT * sizes["checkpoints"] + sum(size for name, size in sizes.items() if name != "checkpoints")
    free = shutil.disk_usage(run.folder.path).free
    return (
        f"{memory.format_bytes(total)} and the rows, a checkpoint being {memory.format_bytes(sizes['checkpoints'])}; "
        f"{memory.format_bytes(free)} are free"
    )


def _reserve(closing_s: dict[str, float], reserve_s: float | None) -> str:
    """Describe the work at the end and, of a budget, what is kept for it."""
    known = {**PIECES, "recalibrate": "recalibration"}
    pieces = ", ".join(f"{known[name]} {seconds:.2g} s" for name, seconds in closing_s.items() if seconds)
    return pieces if reserve_s is None else f"{reserve_s:.1f} s of the budget: {pieces}"


def _scores(notes: dict[str, Any]) -> dict[str, str]:
    """Describe kNN before training, where there is a file to score on."""
    found = {name: notes.get(f"knn_top1_{name.replace(' ', '_')}") for name in BASELINES}
    known = [f"{name} {top1:.1f} %" for name, top1 in found.items() if top1 is not None]
    return {"kNN now": ", ".join(known)} if known else {}
