"""The command fastbyol-train: from a recipe and a .beton file to a run folder with a scored, exported encoder."""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastbyol.beton import BetonError
from fastbyol.budget import Length, Stopwatch, parse_budget, parse_duration, process_age_s
from fastbyol.config import CROPS, ON_ERROR, TARGET_STATISTICS, Config, CropRamp, Recipe
from fastbyol.errors import ConfigError
from fastbyol.loaders import default_workers
from fastbyol.monitor.wandb_sink import require_wandb
from fastbyol.monitor.watchdog import Diverged
from fastbyol.recipes import RECIPES, named
from fastbyol.recipes.overrides import with_peaks
from fastbyol.registry import LOADERS, OPTIMIZERS, Registry
from fastbyol.storage.checkpoint import CheckpointError
from fastbyol.storage.run_folder import RunFolder
from fastbyol.system.command_line import (
    BAD_INPUT,
    DIVERGED,
    DONE,
    INTERRUPTED,
    RANK_LOST,
    THREADS,
    WORKERS,
    Parser,
    fail,
    seed,
)
from fastbyol.system.device import choose_device
from fastbyol.system.distributed import RankLost, local_ranks, rank, ranks
from fastbyol.system.limits import available_cores
from fastbyol.system.signals import StopSignal
from fastbyol.train import memory
from fastbyol.train.runner import run as run_training
from fastbyol.train.step import ENGINES, PRECISIONS

RECALIBRATE = 50  # batches of batch-norm recalibration after a crop ramp


def build_parser() -> argparse.ArgumentParser:
    """Build the parser; names and meanings of flags are a contract (see CHANGELOG.md)."""
    parser = Parser(prog="fastbyol-train", description="Train a BYOL encoder within a budget.")
    parser.add_argument(
        "recipe", metavar="RECIPE", help=f"one of {', '.join(RECIPES)}; NAME+setting=value+setting=value changes it"
    )
    parser.add_argument("--data", metavar="F.beton", help="training images; recipe demo draws its own")
    parser.add_argument("--val", metavar="F.beton", help="labelled images to score with kNN before and after")
    parser.add_argument(
        "--knn-at",
        type=progress_points,
        default=(),
        metavar="X,X",
        help="score at these shares of the run, too: 0.25,0.5,0.75",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--budget",
        metavar="8h",
        help="wall-clock from process start to exit: 90s, 8h, 1d12h; 'until 2026-12-01T08:00'; slurm: what the job has",
    )
    length.add_argument("--epochs", type=float, metavar="N", help="length in epochs (default: the recipe's)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/RECIPE)")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --out from its newest checkpoint; begin it if none is there",
    )
    existing.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    parser.add_argument(
        "--loader",
        type=part_of(LOADERS),
        default="native",
        metavar="NAME",
        help="native: threads; memory: decode once; ffcv, dali: theirs; or your own as module:attribute",
    )
    parser.add_argument(
        "--crop", choices=CROPS, default="kernels", help="who crops the views: our kernels, or DALI, a little apart"
    )
    parser.add_argument("--prefetch", type=int, default=2, metavar="N", help="batches decoded in advance")
    parser.add_argument(
        "--on-error", choices=ON_ERROR, default="fail", help="an image that does not decode: stop, or take the next"
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="global batch, over all ranks (default: the recipe's)"
    )
    parser.add_argument(
        "--micro-batches",
        type=int,
        metavar="N",
        help="equal parts a rank's batch is computed in, each a population of batch norm (default: 1, or on a GPU the "
        "fewest that fit its memory)",
    )
    parser.add_argument(
        "--crop-ramp", type=int, metavar="PX", help="begin with views of this side and grow them to full size"
    )
    parser.add_argument("--base-lr", type=float, metavar="X", help="peak learning rate per 256 images")
    parser.add_argument("--tau-base", type=float, metavar="X", help="target rate at the start")
    parser.add_argument("--weight-decay", type=float, metavar="X")
    parser.add_argument("--warmup-epochs", type=float, metavar="N", help="epochs of rising learning rate")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda where there is one")
    parser.add_argument("--engine", choices=list(ENGINES), help="default: graph on cuda, eager on cpu")
    parser.add_argument("--precision", choices=list(PRECISIONS), help="default: bfloat16 on cuda, float32 on cpu")
    parser.add_argument(
        "--optimizer",
        type=part_of(OPTIMIZERS),
        default="lars",
        metavar="NAME",
        help="lars; apex-larc, which needs NVIDIA apex; or your own as module:attribute",
    )
    parser.add_argument(
        "--target-statistics", choices=TARGET_STATISTICS, help="what the target normalises by (paper: batch)"
    )
    parser.add_argument(
        "--lagged-target",
        action="store_const",
        const=True,
        help="move the target in the launch of the loss, one step later than the paper",
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="N")
    parser.add_argument("--workers", type=int, metavar="N", help=WORKERS)
    parser.add_argument("--threads", type=int, metavar="N", help=THREADS)
    parser.add_argument("--log-every", type=int, default=20, metavar="N", help="steps from row to row of metrics.jsonl")
    parser.add_argument(
        "--checkpoint-every", metavar="5m", help="time from checkpoint to checkpoint (default: by their measured cost)"
    )
    parser.add_argument(
        "--stop-on-collapse", action="store_true", help="end with status 3 when the embeddings collapse"
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="the same bits on every run also on a GPU, where it is slower; what has no such form warns",
    )
    parser.add_argument(
        "--plan",
        nargs="?",
        type=gib,
        const=0.0,
        metavar="GIB",
        help="only say how much GPU memory a step needs and how it would be split: on the GPU here, or on one of GIB",
    )
    parser.add_argument("--profile", action="store_true", help="write a trace of ten steps to the run folder")
    parser.add_argument("--no-tensorboard", action="store_true", help="write no TensorBoard events")
    parser.add_argument("--wandb", metavar="PROJECT", help="log to this project of Weights & Biases")
    return parser


def progress_points(text: str) -> tuple[float, ...]:
    """Parse comma-separated points of the run's progress."""
    try:
        return tuple(sorted({float(point) for point in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} given; wanted fractions of the run, separated by commas, as in 0.25,0.5,0.75"
        ) from None


def part_of(registry: Registry) -> Callable[[str], str]:
    """Return a parser of a name of the registry, or of module:attribute."""

    def check(text: str) -> str:
        try:
            return registry.check(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return check


def gib(text: str) -> float:
    """Parse the memory size of a GPU, in GiB."""
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not 1 <= size <= 10_000:
        raise argparse.ArgumentTypeError(f"{text!r} given; wanted the memory of a GPU in GiB, as in 80")
    return size


def memory_plan(args: argparse.Namespace) -> str:
    """Return a line on how a step of the recipe would use a GPU's memory; raise ConfigError where it cannot fit."""
    recipe, world_size = recipe_of(args), ranks()
    if not args.plan:
        choose_device("cuda")
    free = memory.free_bytes() if not args.plan else round((args.plan - memory.CONTEXT_GIB) * memory.GIB)
    images, parts = recipe.batch_size // world_size, args.micro_batches
    if parts is not None and (parts < 1 or images % parts or images < 2 * parts):
        raise ConfigError(
            f"{images} images do not divide into {parts} equal micro-batches of 2 images or more; give another "
            "--micro-batches"
        )
    fit = memory.fit(
        recipe,
        images=images,
        precision=args.precision or "bfloat16",
        usable_bytes=memory.usable_bytes(free),
        only_parts=parts,
        can_split=args.crop == "kernels",
        can_recompute=args.engine != "compile",
        ranks=world_size,
    )
    return f"{args.recipe}: {fit}; decoded images that wait for the step are not included"


def recipe_of(args: argparse.Namespace) -> Recipe:
    """Build the recipe with the command line's changes; a peak rate given there applies to runs of any length."""
    recipe = named(args.recipe)
    given = {name: getattr(args, name) for name in ("base_lr", "tau_base", "weight_decay", "warmup_epochs")}
    optim_changes = {name: value for name, value in given.items() if value is not None}
    given = {name: getattr(args, name) for name in ("batch_size", "target_statistics", "lagged_target")}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if optim_changes.keys() & {"base_lr", "tau_base"}:
        changes["presets"] = with_peaks(recipe.presets, base_lr=args.base_lr, tau_base=args.tau_base)
    if args.crop_ramp is not None:
        changes |= {"crop_ramp": CropRamp.between(args.crop_ramp, recipe.crop_px), "recalibrate": RECALIBRATE}
    return replace(recipe, optim=replace(recipe.optim, **optim_changes), **changes)


def config_of(args: argparse.Namespace, folder: RunFolder) -> Config:
    """Build the configuration from the command line; recipe demo without --data uses files in the run folder."""
    recipe = recipe_of(args)
    data: Path | None = args.data
    val: Path | None = args.val
    if data is None:
        if args.recipe != "demo" or val is not None or ranks() > 1:
            raise ConfigError(
                f"recipe {args.recipe} needs images; give --data F.beton, a file written by fastbyol-prep write"
            )
        data, val = folder.demo_train, folder.demo_val
    length = Length() if args.budget is None else parse_budget(args.budget)
    device = choose_device(args.device)
    runs_graph = device == "cuda" and ranks() == 1
    every, workers = args.checkpoint_every, args.workers
    if workers is None:
        workers = default_workers(device, cores=available_cores(), local_ranks=local_ranks())
    if args.wandb is not None:
        require_wandb()
    return Config(
        recipe=recipe,
        data=str(data),
        val=None if val is None else str(val),
        budget_s=length.budget_s,
        deadline=length.deadline,
        epochs=recipe.epochs if args.epochs is None and args.budget is None else args.epochs,
        seed=args.seed,
        device=device,
        engine=args.engine or ("graph" if runs_graph else "eager"),
        precision=args.precision or ("bfloat16" if device == "cuda" else "float32"),
        optimizer=args.optimizer,
        loader=args.loader,
        crop=args.crop,
        workers=workers,
        threads=args.threads,
        prefetch=args.prefetch,
        on_error=args.on_error,
        micro_batches=args.micro_batches,
        deterministic=args.deterministic,
        log_every=args.log_every,
        knn_at=args.knn_at,
        checkpoint_s=None if every is None else parse_duration(every, flag="--checkpoint-every"),
        stop_on_collapse=args.stop_on_collapse,
        profile=args.profile,
        tensorboard=not args.no_tensorboard,
        wandb=args.wandb,
    )


def draw_demo_set(config: Config) -> None:
    """Draw the demo set with fastbyol-prep, unless its files exist; raise ConfigError with its error where it fails."""
    if Path(config.data).exists() and config.val and Path(config.val).exists():
        return
    command = [sys.executable, "-m", "fastbyol.data_prep.cli", "demo", str(Path(config.data).parent), "--overwrite"]
    drawn = subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if drawn.returncode:
        raise ConfigError(f"the demo set could not be drawn: {drawn.stderr.strip()}")


def _join_until(argv: Sequence[str]) -> list[str]:
    """Join `--budget until TIME` to one argument, so that it needs no quotes."""
    words = list(argv)
    for index, word in enumerate(words[:-1]):
        if word == "--budget" and words[index + 1] == "until" and len(words) > index + 2:
            return [*words[: index + 1], f"until {words[index + 2]}", *words[index + 3 :]]
        if word == "--budget=until":
            return [*words[:index], f"--budget=until {words[index + 1]}", *words[index + 2 :]]
    return words


def main(argv: Sequence[str] | None = None) -> int:
    """Run fastbyol-train; return 0 when finished, 2 on bad usage or input, 3 when diverged, 75 when interrupted."""
    stopwatch, stop = Stopwatch(age_s=process_age_s()), StopSignal()
    args = build_parser().parse_args(_join_until(sys.argv[1:] if argv is None else argv))
    folder = RunFolder(args.out or Path("runs") / args.recipe)
    try:
        if args.plan is not None:
            print(memory_plan(args))
            return DONE
        with stop.catch():
            config = config_of(args, folder)
            if args.data is None:
                draw_demo_set(config)
            has_finished = run_training(
                config, folder, stopwatch=stopwatch, stop=stop, resume=args.resume, overwrite=args.overwrite
            )
    except KeyboardInterrupt:
        has_finished = False
    except Diverged as error:
        return fail("fastbyol-train", error, status=DIVERGED)
    except RankLost as error:
        return fail("fastbyol-train", error, status=RANK_LOST)
    except (ConfigError, BetonError, CheckpointError, OSError) as error:
        return fail("fastbyol-train", error, status=BAD_INPUT)
    if not has_finished:
        command = "the same command and --resume" if folder.config.exists() else "the same command"
        print(f"fastbyol-train: interrupted; continue with {command}", file=sys.stderr)
        return INTERRUPTED
    if rank() == 0:
        print(f"report: {folder.report}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
