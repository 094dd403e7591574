"""What fastbyol-train does with its flags: a run, or a plan of the memory that a step takes."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastbyol.beton import BetonError, Reader
from fastbyol.budget import Stopwatch, parse_duration
from fastbyol.cli.cache import PREP, Cache, folder_of, is_conversion_of, is_converted
from fastbyol.cli.closing_line import closing_line
from fastbyol.config import Config, CropRamp, Recipe
from fastbyol.errors import ConfigError, require
from fastbyol.monitor.wandb_sink import require_wandb
from fastbyol.monitor.watchdog import Diverged
from fastbyol.recipes.config_file import LENGTHS, formatted, has_length, replaced, timed
from fastbyol.recipes.methods import choices, variants
from fastbyol.recipes.overrides import with_peaks
from fastbyol.storage import files
from fastbyol.storage.checkpoint import CheckpointError
from fastbyol.storage.run_folder import RunFolder, check_free
from fastbyol.system.command_line import (
    BAD_INPUT,
    DIVERGED,
    DONE,
    INTERRUPTED,
    RANK_LOST,
    fail,
    format_list,
    naming_memory,
)
from fastbyol.system.device import choose_device
from fastbyol.system.distributed import RankLost, rank, ranks
from fastbyol.system.shell import operand, quoted
from fastbyol.system.signals import StopSignal
from fastbyol.train import memory
from fastbyol.train.forecast import forecast
from fastbyol.train.runner import run as run_training
from fastbyol.weights import check_source

SAME_NAME = (  # flags that are settings of the run
    "data",
    "val",
    "labelled",
    "init",
    "epochs",
    "seed",
    "device",
    "engine",
    "precision",
    "method",
    "loader",
    "memory_side",
    "crop",
    "workers",
    "threads",
    "prefetch",
    "on_error",
    "micro_batches",
    "deterministic",
    "log_every",
    "knn_at",
    "quality_at",
    "stop_on_collapse",
    "profile",
    "tensorboard",
    "wandb",
)
OF_OPTIM = ("base_lr", "tau_base", "weight_decay", "warmup_epochs", "optimizer")  # flags that are settings of it
OF_RECIPE = ("batch_size", "target_statistics", "lagged_target")
RECALIBRATE = 50  # batches of batch-norm recalibration after a crop ramp


def train(args: argparse.Namespace, *, stopwatch: Stopwatch, stop: StopSignal) -> int:
    """Train, or print the memory plan, as the flags say; return the exit status, see fastbyol.cli.train.main."""
    folder = RunFolder(args.out or Path("runs") / args.recipe)
    try:
        if args.save_config is not None:
            print(save_config(args))
            return DONE
        if args.plan:
            print(memory_plan(args, gib=args.plan))
            return DONE
        with stop.catch(), naming_memory():
            config = config_of(args, folder)
            if not args.resume:
                check_free(folder, overwrite=args.overwrite)
            say_choices(args, config)
            if (config.data, config.val) == (str(folder.demo_train), str(folder.demo_val)):
                draw_demo_set(folder)
            else:
                config = convert_sources(args, config, folder, stopwatch=stopwatch)
            if args.plan is not None:
                lines = forecast(
                    config, folder, stopwatch=stopwatch, stop=stop, resume=args.resume, overwrite=args.overwrite
                )
                print_plan(args.recipe, lines)
                return DONE
            has_finished = run_training(
                config, folder, stopwatch=stopwatch, stop=stop, resume=args.resume, overwrite=args.overwrite
            )
            last_line = closing_line(folder) if has_finished and rank() == 0 else ""
    except KeyboardInterrupt:
        has_finished = False
    except Diverged as error:
        return fail("fastbyol-train", error, status=DIVERGED)
    except RankLost as error:
        return fail("fastbyol-train", error, status=RANK_LOST)
    except (ConfigError, BetonError, CheckpointError, OSError) as error:
        return fail("fastbyol-train", error, status=BAD_INPUT)
    if not has_finished:
        began = folder.config.exists() and not args.overwrite
        command = "the same command and --resume" if began else "the same command"
        print(f"fastbyol-train: interrupted; continue with {command}", file=sys.stderr)
        return INTERRUPTED
    if last_line:
        print(last_line)
    return DONE


def say_choices(args: argparse.Namespace, config: Config) -> None:
    """Print on rank 0 what the recipe chose that is not the usual: an optimiser, gray images."""
    recipe = config.recipe
    if rank() != 0:
        return
    if args.optimizer is None and recipe.optim.optimizer != "lars":
        print(
            f"recipe {recipe.name} trains by {recipe.optim.optimizer}, not by LARS; --optimizer chooses another",
            file=sys.stderr,
        )
    if recipe.encoder.channels == 1:
        print("1 channel: views leave out saturation, hue and grayscale, which need RGB", file=sys.stderr)


def convert_sources(args: argparse.Namespace, config: Config, folder: RunFolder, *, stopwatch: Stopwatch) -> Config:
    """Return the configuration with what its images are converted to; a resumed run keeps the files it began with."""
    if args.resume and folder.config.exists():
        before = folder.read_config()
        if is_conversion_of(before.data, config.data):
            config = replace(config, data=before.data)
        if config.val is not None and is_conversion_of(before.val, config.val):
            config = replace(config, val=before.val)
        if config.labelled is not None and is_conversion_of(before.labelled, config.labelled):
            config = replace(config, labelled=before.labelled)
    end_s = config.end_s(stopwatch.elapsed_at)
    cache = Cache(
        folder_of(folder.path, args.cache),
        tuple(args.prep),
        end_s=None if end_s is None else time.monotonic() + end_s - stopwatch.elapsed_s(),
    )
    scored = [source for source in (config.val, config.labelled) if source is not None]
    require(
        not cache.drops_labels or all(is_converted(source) for source in scored),
        "--prep '--labels none' would take the labels of --val and --labelled, too; convert those with fastbyol-prep "
        "write, and give the .beton files",
    )
    if config.val is None:
        return replace(config, data=cache.beton(config.data))
    if config.labelled is None:
        data, val = cache.pair(config.data, config.val)
        return replace(config, data=data, val=val)
    labelled, val = cache.pair(config.labelled, config.val)
    return replace(config, data=cache.beton(config.data), val=val, labelled=labelled)


def print_plan(name: str, lines: dict[str, str]) -> None:
    """Print what a run would be, on rank 0."""
    if rank() == 0:
        print(f"{name} as planned; nothing was trained:\n{format_list(lines)}")


def memory_plan(args: argparse.Namespace, *, gib: float) -> str:
    """Return a line on how a step of the recipe would use a GPU's memory; raise ConfigError where it cannot fit.

    With --method auto, a line for each recipe that it may choose.
    """
    settings = settings_of(args)
    recipe = settings["recipe"]
    recipes = variants(recipe) if settings.get("method") == "auto" else [recipe]
    note = "decoded images that wait for the step are not included"
    return "\n".join(f"{each.name}: {_fit(each, settings, gib=gib)}; {note}" for each in recipes)


def _fit(recipe: Recipe, settings: dict[str, Any], *, gib: float) -> memory.Fit:
    """Plan a step of a recipe on a GPU of so much memory."""
    world_size = ranks()
    free = round((gib - memory.CONTEXT_GIB) * memory.GIB)
    images, parts = recipe.batch_size // world_size, settings.get("micro_batches")
    if parts is not None and (parts < 1 or images % parts or images < 2 * parts):
        raise ConfigError(
            f"{images} images do not divide into {parts} equal micro-batches of 2 images or more; give another "
            "--micro-batches"
        )
    return memory.fit(
        recipe,
        images=images,
        precision=settings.get("precision") or "bfloat16",
        usable_bytes=memory.usable_bytes(free),
        only_parts=parts,
        can_split=settings.get("crop") in (None, "kernels"),
        can_recompute=settings.get("engine") != "compile",
        ranks=world_size,
    )


def recipe_of(args: argparse.Namespace) -> Recipe:
    """Build the recipe with the command line's changes; a peak rate given there applies to runs of any length."""
    recipe: Recipe = args.file["recipe"]
    optim_changes, changes = _given(args, OF_OPTIM), _given(args, OF_RECIPE)
    if optim_changes.keys() & {"base_lr", "tau_base"}:
        changes["presets"] = with_peaks(recipe.presets, base_lr=args.base_lr, tau_base=args.tau_base)
    if args.channels is not None:
        changes["encoder"] = replace(recipe.encoder, channels=args.channels)
    if args.crop_ramp is not None:
        changes |= {"crop_ramp": CropRamp.between(args.crop_ramp, recipe.crop_px), "recalibrate": RECALIBRATE}
    return replace(recipe, optim=replace(recipe.optim, **optim_changes), **changes)


def _given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Return the values of those flags that were given."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the file and, above it, the flags give; `timed` makes arguments of Config of them.

    Raises ConfigError for a flag beside --method auto that a choice would change.
    """
    changes = {**_given(args, SAME_NAME), "recipe": recipe_of(args)}
    if args.checkpoint_every is not None:
        changes["checkpoint_s"] = parse_duration(args.checkpoint_every, flag="--checkpoint-every")
    if args.budget is not None:
        changes["budget"] = args.budget
    settings = replaced(args.file, changes)
    if settings.get("method") == "auto":
        choices(settings["recipe"], flags=_given(args, (*OF_OPTIM, *OF_RECIPE)))
    return settings


def config_of(args: argparse.Namespace, folder: RunFolder) -> Config:
    """Build the configuration from file and flags; recipe demo without images uses files in the run folder."""
    settings = settings_of(args)
    if "data" not in settings:
        if args.recipe.partition("+")[0] != "demo" or _scores_others(settings) or ranks() > 1:
            raise ConfigError(
                f"recipe {args.recipe} needs images; give --data FOLDER, or a .beton written by fastbyol-prep write"
            )
        settings |= {"data": str(folder.demo_train), "val": str(folder.demo_val)}
    goes_on = args.resume and folder.config.exists()
    if goes_on:
        recorded = folder.read_config()
        if settings.get("precision") is None:  # another machine's default may differ
            settings["precision"] = recorded.precision
        if args.budget is None and args.epochs is None and not has_length(args.file):
            settings |= {name: getattr(recorded, name) for name in LENGTHS}
    config = Config(**timed(settings))
    choose_device(config.device)
    if config.wandb is not None:
        require_wandb()
    if config.init is not None and not goes_on:
        check_source(config.init)
    return config


def _scores_others(settings: dict[str, Any]) -> bool:
    """Tell whether settings name images to score on, which belong to other images than the demo's."""
    return any(settings.get(name) is not None for name in ("val", "labelled"))


def save_config(args: argparse.Namespace) -> str:
    """Write the settings of a command line to its --save-config, and return a line that says so."""
    settings, path = settings_of(args), args.save_config
    length = {"budget": "1h"} if "budget" in settings else {}  # Slurm may be elsewhere, as the GPU may
    Config(**timed({"data": "", **settings, **length, "device": "cpu"}))  # which checks them
    require(args.overwrite or not path.exists(), f"{path} exists; give another --save-config, or --overwrite")
    files.write(path, formatted(path, settings))
    return f"wrote {path}; fastbyol-train --config {quoted(path)} trains by it"


def draw_demo_set(folder: RunFolder) -> None:
    """Draw the demo set with fastbyol-prep, unless its files exist; raise ConfigError with its error where it fails."""
    there = [path for path in (folder.demo_train, folder.demo_val) if path.exists()]
    if len(there) == 2:
        return
    for path in there:  # one alone is left by a drawing that was killed, or is the user's own
        require(_is_drawn(path), f"{path} is in the place of the demo set; give it by --data, or remove it")
    command = [*PREP, "demo", operand(folder.demo_train.parent), "--overwrite"]
    drawn = subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if drawn.returncode:
        raise ConfigError(f"the demo set could not be drawn: {drawn.stderr.strip()}")


def _is_drawn(beton: Path) -> bool:
    """Return whether fastbyol-prep demo has drawn a .beton."""
    with suppress(BetonError), Reader(beton) as reader:
        return str(reader.sidecar.get("source", "")).startswith("fastbyol-prep demo")
    return False
