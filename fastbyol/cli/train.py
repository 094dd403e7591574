"""The command fastbyol-train: its flags, which are checked before torch is imported."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from fastbyol import registry
from fastbyol.budget import Stopwatch, check_budget, parse_duration, process_age_s
from fastbyol.cli.recipes import format_recipes
from fastbyol.cli.settings import format_settings
from fastbyol.config import CROPS, ENGINES, METHODS, ON_ERROR, PRECISIONS, TARGET_STATISTICS, Config
from fastbyol.errors import ConfigError, require
from fastbyol.recipe import CHANNELS
from fastbyol.recipes import named
from fastbyol.recipes.config_file import read
from fastbyol.system.command_line import (
    ANY_SOURCE,
    BAD_INPUT,
    DONE,
    THREADS,
    WORKERS,
    Parser,
    add_cache_flags,
    add_version,
    fail,
    join_prep,
    seed,
)
from fastbyol.system.signals import StopSignal

OF_RECIPE = "(default: the recipe's)"


class RecipesAction(argparse.Action):
    """--recipes: print the table of recipes and exit."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        """Print the table."""
        print(format_recipes())
        parser.exit()


def build_parser() -> Parser:
    """Build the parser; names and meanings of flags are a contract (see CHANGELOG.md)."""
    parser = Parser(
        prog="fastbyol-train",
        usage="fastbyol-train RECIPE [options]\n       fastbyol-train --config FILE [options]",
        description="Train a BYOL encoder within a budget.",
    )
    parser.add_argument(
        "recipe",
        nargs="?",
        metavar="RECIPE",
        help="name of a recipe, see --recipes; NAME+setting=value+setting=value changes it",
    )
    add_version(parser)
    parser.add_argument(
        "--recipes", action=RecipesAction, nargs=0, default=argparse.SUPPRESS, help="print a table of recipes and exit"
    )
    parser.add_argument(
        "--settings",
        action="store_true",
        help="print every setting with its meaning, range and source, with RECIPE its values, and exit",
    )
    _add_config(parser)
    _add_data(parser)
    _add_length(parser)
    _add_run_folder(parser)
    _add_method(parser)
    _add_machine(parser)
    _add_logging(parser)
    return parser


def default(setting: str) -> str:
    """Return the default of a setting of the run, as it stands in a help text; flags not given are None."""
    value = next(field.default for field in dataclasses.fields(Config) if field.name == setting)
    return f"(default: {value})"


def _add_config(parser: Parser) -> None:
    group = parser.add_argument_group("settings as a file")
    group.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="settings from a .toml or .json file, such as a run's config.json; flags given here rule (default: none)",
    )
    group.add_argument(
        "--save-config",
        type=Path,
        metavar="FILE",
        help="write the settings of this command to a .toml or .json file, and exit (default: train)",
    )


def _add_data(parser: Parser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        metavar="SOURCE",
        help=f"training images: {ANY_SOURCE}, such as a folder; recipe demo draws its own",
    )
    group.add_argument(
        "--val",
        metavar="SOURCE",
        help="labelled images to score by kNN before and after training",
    )
    group.add_argument(
        "--labelled",
        metavar="SOURCE",
        help="labelled images among which kNN looks for neighbours (default: those of --data that have a label)",
    )
    add_cache_flags(group)
    group.add_argument(
        "--loader",
        type=part_of(registry.LOADERS),
        metavar="NAME",
        help="native: threads; memory: decode each image once; ffcv, dali: these packages; nvjpeg: decode on the GPU; "
        f"or your module:attribute {default('loader')}",
    )
    group.add_argument(
        "--memory-side",
        type=int,
        metavar="PX",
        help="loader memory: keep images with a short side of at most PX pixels (default: as in the file)",
    )
    group.add_argument("--workers", type=int, metavar="N", help=WORKERS)
    group.add_argument("--prefetch", type=int, metavar="N", help=f"batches decoded in advance {default('prefetch')}")
    group.add_argument(
        "--on-error",
        choices=ON_ERROR,
        help=f"an image of a .beton that does not decode: stop, or take the next {default('on_error')}",
    )


def _add_length(parser: Parser) -> None:
    group = parser.add_argument_group("length")
    length = group.add_mutually_exclusive_group()
    length.add_argument(
        "--budget",
        metavar="TIME",
        help="wall-clock from process start to exit: 90s, 8h, 1d12h; until 2026-12-01T08:00; slurm: what the job has",
    )
    length.add_argument("--epochs", type=float, metavar="N", help=f"passes over the training images {OF_RECIPE}")


def _add_run_folder(parser: Parser) -> None:
    group = parser.add_argument_group("run folder")
    group.add_argument("--out", type=Path, metavar="DIR", help="folder of the run (default: runs/RECIPE)")
    existing = group.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --out from its newest checkpoint, with more --epochs or a longer --budget beyond its "
        "end; begin it if none is there",
    )
    existing.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    group.add_argument(
        "--checkpoint-every", metavar="TIME", help="between checkpoints, such as 5m (default: by their measured cost)"
    )


def _add_method(parser: Parser) -> None:
    group = parser.add_argument_group("method")
    group.add_argument(
        "--method",
        choices=METHODS,
        help=f"the recipe's own method, or the one that has won at the length of this run {default('method')}",
    )
    group.add_argument("--batch-size", type=int, metavar="N", help=f"images in a step, over all ranks {OF_RECIPE}")
    group.add_argument("--base-lr", type=float, metavar="X", help=f"peak learning rate per 256 images {OF_RECIPE}")
    group.add_argument(
        "--warmup-epochs", type=float, metavar="N", help=f"epochs in which the learning rate rises {OF_RECIPE}"
    )
    group.add_argument("--weight-decay", type=float, metavar="X", help=f"strength of weight decay {OF_RECIPE}")
    group.add_argument("--tau-base", type=float, metavar="X", help=f"EMA rate of the target at the start {OF_RECIPE}")
    group.add_argument(
        "--channels",
        type=int,
        choices=CHANNELS,
        metavar="N",
        help="3 for RGB, or 1 for gray, computed from it, for which views leave out saturation, hue and grayscale "
        f"{OF_RECIPE}",
    )
    group.add_argument(
        "--init",
        metavar="WEIGHTS",
        help="start from the weights of a run, a checkpoint or an encoder's file, torchvision:NAME or timm:NAME "
        "(default: drawn by the seed)",
    )
    group.add_argument("--seed", type=seed, metavar="N", help=f"seed of weights, order and views {default('seed')}")
    group.add_argument(
        "--optimizer",
        type=part_of(registry.OPTIMIZERS),
        metavar="NAME",
        help="lars; sgd, with momentum; muon, at --base-lr 0.1 or less; adamw; apex-larc, which needs NVIDIA apex; "
        f"or your module:attribute {OF_RECIPE}",
    )
    group.add_argument(
        "--crop", choices=CROPS, help=f"what crops the views: our kernels, or DALI, a little apart {default('crop')}"
    )
    group.add_argument(
        "--crop-ramp", type=int, metavar="PX", help="begin with views of this side and grow them (default: full size)"
    )
    group.add_argument(
        "--target-statistics",
        choices=TARGET_STATISTICS,
        help="normalisation of the target: by its batch, as in the paper, or by running statistics (default: batch)",
    )
    group.add_argument(
        "--lagged-target",
        action="store_const",
        const=True,
        help="move the target in the launch of the loss, one step later than the paper",
    )


def _add_machine(parser: Parser) -> None:
    group = parser.add_argument_group("machine")
    group.add_argument("--device", choices=["cuda", "cpu"], help="where to train (default: cuda where there is one)")
    group.add_argument(
        "--engine",
        choices=ENGINES,
        help="how a step runs: op by op, as a CUDA graph, or by torch.compile (default: graph on one GPU, else eager)",
    )
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="number format of the networks (default: bfloat16 on cuda and on a CPU with AVX512-BF16 or AMX, else "
        "float32; with --resume, the run's)",
    )
    group.add_argument(
        "--micro-batches",
        type=int,
        metavar="N",
        help="equal parts a rank's batch is computed in, each a population of batch norm (default: 1, or on a GPU the "
        "fewest that fit its memory)",
    )
    group.add_argument("--threads", type=int, metavar="N", help=THREADS)
    group.add_argument(
        "--deterministic",
        action="store_const",
        const=True,
        help="the same bits on every run also on a GPU, where it is slower; what has no such form warns",
    )
    group.add_argument(
        "--plan",
        nargs="?",
        type=gib,
        const=0.0,
        metavar="GIB",
        help="train nothing, and say what would happen: measure for some seconds here; of a GPU of GIB, predict memory",
    )


def _add_logging(parser: Parser) -> None:
    group = parser.add_argument_group("scores and logging")
    group.add_argument(
        "--knn-at",
        type=progress_points,
        metavar="X,X",
        help="score on --val at these shares of the run, too: 0.25,0.5,0.75",
    )
    group.add_argument(
        "--quality-at",
        type=progress_points,
        metavar="X,X",
        help="the same without labels, also without --val: RankMe, effective rank, alignment, uniformity",
    )
    group.add_argument(
        "--log-every", type=int, metavar="N", help=f"steps between rows of metrics.jsonl {default('log_every')}"
    )
    for flag, setting, value, text in (
        ("--stop-on-collapse", "stop_on_collapse", True, "end with status 3 when the embeddings collapse"),
        ("--profile", "profile", True, "write a trace of ten steps to the run folder"),
        ("--no-tensorboard", "tensorboard", False, "write no TensorBoard events"),
    ):
        group.add_argument(flag, dest=setting, action="store_const", const=value, help=text)
    group.add_argument("--wandb", metavar="PROJECT", help="log to this project of Weights & Biases")


def check_texts(args: argparse.Namespace) -> None:
    """Read the recipe and the file of settings into `args`; raise ConfigError for a text that cannot be read."""
    args.file = {} if args.config is None else read(args.config)
    require(
        args.recipe is None or "recipe" not in args.file,
        f"recipe {args.recipe} is given, and {args.config} has one; give one of the two",
    )
    if args.recipe is not None:
        args.file["recipe"] = named(args.recipe)
    if "recipe" in args.file:
        args.recipe = args.file["recipe"].name
    if args.budget is not None:
        check_budget(args.budget)
    if args.checkpoint_every is not None:
        parse_duration(args.checkpoint_every, flag="--checkpoint-every")


def part_of(parts: registry.Registry) -> Callable[[str], str]:
    """Return an argparse type for the name of a registered part, or the user's own module:attribute."""

    def name(text: str) -> str:
        try:
            return parts.check(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return name


def progress_points(text: str) -> tuple[float, ...]:
    """Parse comma-separated points of the run's progress."""
    try:
        return tuple(sorted({float(point) for point in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} given; wanted fractions of the run, separated by commas, as in 0.25,0.5,0.75"
        ) from None


def gib(text: str) -> float:
    """Parse the memory size of a GPU, in GiB."""
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not 1 <= size <= 10_000:
        raise argparse.ArgumentTypeError(f"{text!r} given; wanted the memory of a GPU in GiB, as in 80")
    return size


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
    parser = build_parser()
    args = parser.parse_args(join_prep(_join_until(sys.argv[1:] if argv is None else argv)))
    try:
        check_texts(args)
    except (ConfigError, OSError) as error:
        return fail("fastbyol-train", error, status=BAD_INPUT)
    if args.settings:
        print(format_settings(args.file.get("recipe")))
        return DONE
    if args.recipe is None:
        parser.error("the following arguments are required: RECIPE, or --config FILE with one")
    from fastbyol.cli.train_run import train  # noqa: PLC0415 - it imports torch, which takes seconds

    return train(args, stopwatch=stopwatch, stop=stop)


if __name__ == "__main__":
    sys.exit(main())
