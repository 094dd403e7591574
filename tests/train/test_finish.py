"""Laws of the rehearsal: it measures what the closing work will take, neither colder nor smaller."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastbyol import schedule
from fastbyol.beton import Reader
from fastbyol.budget import Stopwatch
from fastbyol.config import Config
from fastbyol.evaluate.images import pad_to_length
from fastbyol.monitor.metrics import Intervals
from fastbyol.recipes import named
from fastbyol.storage import checkpoint
from fastbyol.storage.checkpoint import copy_to_host
from fastbyol.storage.run_folder import RunFolder
from fastbyol.system.distributed import join_ranks
from fastbyol.system.signals import StopSignal
from fastbyol.train.opening import OpenRun
from fastbyol.train.runner import Run
from tests.conftest import Betons


@contextmanager
def begun(betons: Betons, out: Path, *, recipe_name: str = "demo+batch_size=32") -> Iterator[Run]:
    recipe = named(recipe_name)
    config = Config(recipe, data=str(betons.train), val=str(betons.val), epochs=9.0)
    with ExitStack() as stack:
        world = stack.enter_context(join_ranks("cpu"))
        train, val = (stack.enter_context(Reader(path)) for path in (betons.train, betons.val))
        watch = Stopwatch(age_s=0.0)
        opened = OpenRun(config, RunFolder(out), train, (train, val), world, "new")
        yield Run(config, opened, stopwatch=watch, stop=StopSignal())


def test_it_leaves_nothing_but_what_others_have_put_beside_it(betons: Betons, tmp_path: Path) -> None:
    with begun(betons, tmp_path / "run") as run:
        mine = tmp_path / "run" / "rehearsal" / "report.html"
        mine.parent.mkdir(parents=True)
        mine.write_text("mine")
        (run.folder.rehearsal.path / "scores").mkdir(parents=True)  # of a run that was killed
        run.closing.rehearse()
        assert [path for path in run.folder.path.rglob("*") if path.is_file()] == [mine]
        assert mine.read_text() == "mine"
        assert not run.folder.rehearsal.path.exists()


def test_what_only_the_first_batch_takes_is_not_reserved(betons: Betons, tmp_path: Path) -> None:
    with begun(betons, tmp_path / "run") as run:
        seen: list[Any] = []

        def compile_first(*_: Any) -> None:
            if not seen:
                time.sleep(2.0)
            seen.append(None)

        run.loop.model.online.encoder.register_forward_pre_hook(compile_first)
        run.closing.rehearse()
        assert seen
        assert run.closing.seconds["evaluate"] < 2.0


def test_a_score_ends_before_a_batch_that_would_end_too_late(betons: Betons, tmp_path: Path) -> None:
    with begun(betons, tmp_path / "run") as run:
        run.folder.path.mkdir()
        run.loop.position = replace(run.loop.position, train_s=1.0)
        batches: list[int] = []

        def be_slow(_: Any, views: tuple[Any]) -> None:
            batches.append(len(views[0]))
            time.sleep(0.5)

        run.loop.model.online.encoder.register_forward_pre_hook(be_slow)
        began_s = run.stopwatch.elapsed_s()
        run.closing.finish(deadline_s=began_s + 60, score_until_s=began_s + 1.3)
        assert len(batches) in {1, 2}  # a third would end after 1.5 s
        result = json.loads(run.folder.result.read_text())
        assert result["knn_top1"] is None
        assert any("no time was left" in line for line in run.loop.logger.pending_warnings)


def test_batches_of_a_gpu_have_one_size() -> None:
    parts = pad_to_length([np.arange(4), np.arange(4, 6)], 4)
    assert [part.tolist() for part in parts] == [[0, 1, 2, 3], [4, 5, 5, 5]]


# bytes: of names, and of AdamW's counts of steps, a tensor for each parameter; the momenta of the probe are 6 KB
@pytest.mark.parametrize(("optimizer", "named_bytes"), [("lars", 1000), ("muon", 1000), ("adamw", 12_000)])
def test_the_rehearsed_checkpoint_is_as_large_as_those_of_training(
    optimizer: str, named_bytes: int, betons: Betons, tmp_path: Path
) -> None:
    def size(state: dict[str, Any], step: int) -> int:
        checkpoint.save(tmp_path / "checkpoints", copy_to_host(state), step=step)
        return (tmp_path / "checkpoints" / f"step-{step:09d}.pt").stat().st_size

    with begun(betons, tmp_path / "run", recipe_name=f"demo+batch_size=32+optimizer={optimizer}") as run:
        rehearsed = size(run.loop.state(with_momenta=True), 0)
        batches = run.loop.pipeline.batches(0)
        run.loop.step(batches, schedule.build(run.config.recipe, epochs=9.0), Intervals(), progress=0.0)
        batches.close()
        assert rehearsed == pytest.approx(size(run.loop.state(), 1), abs=named_bytes)
