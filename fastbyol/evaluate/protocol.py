"""The form of an evaluation protocol: its flags, and the job that scores an encoder."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from fastbyol.storage.scores import Scores
from fastbyol.system.command_line import positive_number, seed

if TYPE_CHECKING:
    from fastbyol.beton import Reader
    from fastbyol.evaluate.images import InputSettings
    from fastbyol.model.parts import Encoder

Files: TypeAlias = "tuple[Reader, Reader]"  # labelled images to learn from, and to score on
Job: TypeAlias = "Callable[[Encoder, str], Scores]"  # from an encoder on its device, and a label for progress bars
Prepare: TypeAlias = "Callable[[argparse.Namespace, Any, InputSettings], tuple[Scores, Job]]"


def _always(_: argparse.Namespace) -> bool:
    return True


@dataclass(frozen=True)
class Protocol:
    """An evaluation protocol, found by name in registry.PROTOCOLS or at the user's own module:attribute.

    add_arguments: add the protocol's own flags. ENCODER, --json, --device and --threads are there already and, with
    `has_files`, --train, --val, --workers, --px and --margin. prepare finds the run's folder, or that which keeps the
    scores of another encoder, as `run_dir`.
    prepare: from the parsed flags, the two open files (None without `has_files`) and the input settings of the run's
    recipe, return facts to save beside the scores, and the job. Raise ConfigError for settings that cannot be used,
    before anything is computed. Without `has_files` the facts name the data as "train" and "val". Without `has_val`
    there is no --val: both files are that of --train, which need not be labelled.
    baseline: the key of the second encoder's scores, which is the same network as drawn.
    scores_baseline: from the parsed flags, tell whether the second encoder is scored.
    scores_raw_pixels: the images' own pixels are scored as representations, too.

    A job returns percentages under "top1", "top5", "miou", or "score" with the name of its "metric", and anything else
    that JSON can hold.
    """

    add_arguments: Callable[[argparse.ArgumentParser], None]
    prepare: Prepare
    has_files: bool = True
    has_val: bool = True
    baseline: str = "random_init"
    scores_baseline: Callable[[argparse.Namespace], bool] = _always
    scores_raw_pixels: bool = False


def add_seed(parser: argparse.ArgumentParser) -> None:
    """Add --seed."""
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="seed of splits, order and crops")


def add_from_scratch(parser: argparse.ArgumentParser) -> None:
    """Add --from-scratch."""
    parser.add_argument("--from-scratch", action="store_true", help="also tune the network that the run started from")


def add_lrs(parser: argparse.ArgumentParser, default: Sequence[float], *, text: str) -> None:
    """Add --lrs, learning rates above 0; text: its help."""
    parser.add_argument("--lrs", type=positive_number, nargs="+", default=list(default), metavar="X", help=text)
