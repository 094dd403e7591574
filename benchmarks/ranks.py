"""CPU time of a step on several gloo ranks of this machine, beside that of each rank's work and all-reduces alone."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.cases.step import RATES, _views
from benchmarks.rows import place
from fastbyol import optim
from fastbyol.model.byol import BYOL
from fastbyol.recipes import named
from fastbyol.train import step

RECIPE, BATCH = "cifar10_tiny", 48
RANKS = (1, 2, 3)
WARM_UP, STEPS = 3, 20
TIMEOUT_S = 600


def measure() -> Iterator[dict[str, Any]]:
    """Yield a row for each number of ranks: measured and predicted CPU-ms a step, all ranks together."""
    alone = _run(_alone, 1)[0]
    for ranks in RANKS:
        found = _run(_together, ranks)
        replayed = sum(each["replayed_ms"] for each in found) if ranks > 1 else 0.0  # one rank's are in its step
        yield {
            "ranks": ranks,
            "images": BATCH // ranks,
            "cpu_ms": round(sum(each["cpu_ms"] for each in found), 2),
            "predicted_ms": round(ranks * alone[BATCH // ranks] + replayed, 2),
            "all_reduces_ms": round(replayed, 2),
            "all_reduces": found[0]["all_reduces"],
            "all_reduced_bytes": found[0]["all_reduced_bytes"],
            **place("cpu"),
        }


def _cpu_ms(run: Callable[[], object]) -> float:
    for _ in range(WARM_UP):
        run()
    began = time.process_time()
    for _ in range(STEPS):
        run()
    return 1000 * (time.process_time() - began) / STEPS


def _engine(images: int) -> tuple[step.Eager, Callable[[], object]]:
    """Build a rank's step: one alone takes the way of several, whose batch norm is another in plain torch."""
    recipe = named(RECIPE)
    model = BYOL(recipe.encoder, recipe.head, seed=0)
    engine = step.Eager(model, optim.build(model, model.target_of(), recipe.optim))
    assert dist.group.WORLD is not None
    engine.distribute(dist.group.WORLD)
    views = _views(images, recipe.crop_px, "cpu")
    return engine, lambda: engine(views, **RATES)


def _alone(_rank: int) -> dict[int, float]:
    return {BATCH // ranks: _cpu_ms(_engine(BATCH // ranks)[1]) for ranks in RANKS}


def _together(_rank: int) -> dict[str, Any]:
    engine, run = _engine(BATCH // dist.get_world_size())
    sizes = _all_reduces(run)
    cpu_ms = _cpu_ms(run)
    gradients = sum(p.numel() for p in engine.model.parameters() if p.requires_grad)
    sent = [torch.zeros(size) for size in (*sizes, gradients)]

    def replay() -> None:
        for tensor in sent:
            dist.all_reduce(tensor)

    moved = 4 * sum(sizes)
    return {"cpu_ms": cpu_ms, "replayed_ms": _cpu_ms(replay), "all_reduces": len(sizes), "all_reduced_bytes": moved}


def _all_reduces(run: Callable[[], object]) -> list[int]:
    """List the elements of the all-reduces of a step, without those of the gradients, which C++ calls."""
    sizes: list[int] = []
    all_reduce = dist.all_reduce

    def noted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = noted
    try:
        run()
    finally:
        dist.all_reduce = all_reduce
    return sizes


def _enter(main: Callable[[int], Any], rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    method = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=ranks)
    torch.save(main(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()


def _run(main: Callable[[int], Any], ranks: int) -> list[Any]:
    """Call main(rank) in processes that form a gloo group; return the results in order of rank."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [context.Process(target=_enter, args=(main, rank, ranks, folder)) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(TIMEOUT_S)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        if any(codes):
            raise RuntimeError(f"{ranks} ranks ended with exit statuses {codes}, not all 0; see their errors above")
        return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]
