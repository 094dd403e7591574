"""A run made longer: its progress is measured anew by the longer length, and the learning rate warms up again.

At the step it has reached, a run of 100 epochs that is given 200 stands at half of the longer run. From there on its
schedules are those of 200 epochs, peaks included. The learning rate, at 0 after a finished run, rises linearly from
where it stood to the longer schedule's, over the share of what is left that the warm-up takes of a whole run. By the
clock the lengths are budgets.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from fastbyol import schedule
from fastbyol.budget import format_duration
from fastbyol.config import Config
from fastbyol.schedule import Rejoin, Schedule
from fastbyol.storage.run_folder import CLOCKS_DIFFER_S
from fastbyol.train.loop import Loop

NOTE = "lengthened"  # in the notes of a run: each time, with its step
WARMUP_MAX = 0.25  # of a run by the clock; the paper's shortest preset warms up for 10 of 40 epochs


def total_steps(config: Config, *, images: int) -> int:
    """Return the steps of a run of a number of epochs."""
    assert config.epochs is not None
    return max(math.ceil(config.epochs * images / config.recipe.batch_size), 1)


def build_schedule(config: Config, notes: dict[str, Any], *, epochs: float) -> Schedule:
    """Build the schedules of a run of that many epochs, with the second warm-up of one that was made longer."""
    warmup_max = 1.0 if config.epochs is not None else WARMUP_MAX
    built = schedule.build(config.recipe, epochs=epochs, warmup_max=warmup_max)
    if not notes.get(NOTE):
        return built
    last = notes[NOTE][-1]
    return replace(built, rejoin=Rejoin(last["progress"], last["lr"], built.warmup * (1 - last["progress"])))


def lengthen(loop: Loop, *, epochs: float | None, deadline_s: float | None) -> bool:
    """Move a restored loop's progress to what it is of a longer run, and note that; tell whether the run is longer.

    epochs: for which the schedules were built; deadline_s: the new end of a run by the clock, in seconds of the run.
    """
    config, at = loop.config, loop.position
    if epochs is None:  # the checkpoint is of no step
        return False
    before, now = _lengths(loop, epochs=epochs, deadline_s=deadline_s)
    if before is None or now <= before:
        return False
    if config.epochs is None:
        progress = at.progress * before / now
    else:
        progress = min(at.step / total_steps(config, images=len(loop.reader)), 1.0)
    lr = build_schedule(config, loop.notes, epochs=epochs).learning_rate(at.progress)
    unit = "epochs" if config.epochs is not None else "budget_s"
    note = {"step": at.step, f"{unit}_before": before, unit: now, "progress": progress, "lr": lr}
    loop.notes[NOTE] = [*loop.notes.get(NOTE, []), note]
    loop.position = replace(at, progress=progress)
    loop.watchdog.low_since = None  # it is a progress
    loop.scored_at = {share for share in loop.scored_at if share <= progress}
    loop.logger.warn(describe(note))
    return True


def _lengths(loop: Loop, *, epochs: float, deadline_s: float | None) -> tuple[float | None, float]:
    """Return the length by which the loop's progress was measured, None if it stays so, and the one given now."""
    if deadline_s is None:
        assert loop.config.epochs is not None
        return epochs, loop.config.epochs
    before = loop.notes.get("plan", {}).get("budget_s")
    if loop.config.deadline is not None and (
        loop.position.progress < 1.0 or (before is not None and deadline_s <= before + CLOCKS_DIFFER_S)
    ):
        return None, deadline_s  # a job that starts again has another end, over which the rest is spread
    return before, deadline_s


def describe(note: dict[str, Any]) -> str:
    """Return a line about one time that a run was made longer."""
    if "epochs" in note:
        lengths = f"{note['epochs_before']:g} to {note['epochs']:g} epochs"
    else:
        lengths = f"{format_duration(note['budget_s_before'])} to {format_duration(note['budget_s'])}"
    return (
        f"made longer at step {note['step']}, from {lengths}: that step is {note['progress']:.1%} of the longer run, "
        f"whose schedules hold from there on; the learning rate warms up again from {note['lr']:.3g}"
    )
