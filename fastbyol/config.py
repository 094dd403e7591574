"""Configuration of a run: a frozen dataclass that checks its values when it is built, its JSON, and its files."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbyol import tables
from fastbyol.errors import ConfigError, require
from fastbyol.ranges import BATCHES_MAX, COUNT_MAX, EPOCHS_MAX, SECONDS_MAX, THREADS_MAX, check_number, check_text
from fastbyol.recipe import (
    EAGER,
    NORMALIZATIONS,
    TARGET_STATISTICS,
    TARGETS,
    CropRamp,
    EncoderConfig,
    HeadConfig,
    ObjectiveConfig,
    OptimConfig,
    Preset,
    Recipe,
    ViewConfig,
)
from fastbyol.registry import LOADERS

__all__ = [
    "CROPS",
    "NORMALIZATIONS",
    "ON_ERROR",
    "TARGETS",
    "TARGET_STATISTICS",
    "Config",
    "CropRamp",
    "EncoderConfig",
    "HeadConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "Preset",
    "Recipe",
    "ViewConfig",
    "from_json",
    "to_json",
]

CROPS = ("kernels", "dali")
ENGINES = ("eager", "graph", "compile")
PRECISIONS = ("float32", "bfloat16")
METHODS = ("recipe", "auto")
ON_ERROR = ("fail", "skip")  # for a sample that does not decode
GONE = {"folded_target": False}  # settings of recipes that files of earlier runs hold, and what changed nothing


@dataclass(frozen=True)
class Config:
    """The settings of one run: its recipe, data, length and hardware.

    `recipe`: also by its name, as in Config("cifar10_tiny", data="train.beton", budget_s=300). `device`, `engine`,
    `precision` and `workers` follow from the machine, as on the command line, where they are None.
    Give exactly one length: `budget_s`, seconds over all processes of the run; `deadline`, a Unix time; or `epochs`.
    `method` "auto": what has won at this length takes the place of the recipe's own method, see recipes/methods.py.
    `labelled`: images among which kNN looks for neighbours of `val`, instead of those of `data` that have a label.
    `init`: the weights that online and target network start from, as fastbyol.weights reads them, None for drawn ones;
    `init_digest`: theirs, which the run fills in.
    `checkpoint_s` None: the measured cost of a checkpoint decides how often one is written. `knn_at`: shares of the run
    at which the encoder is scored on `val`, besides its start and end; `quality_at`: the same, also without `val`, when
    it is measured without labels alone. `micro_batches` None: the GPU's memory decides
    in how many parts a rank's batch is computed, and whether activations are recomputed (`recomputes`, which does not
    change the result); on a CPU it means 1. `deterministic`: the same bits again on the same GPU, more slowly.
    `memory_side`: pixels of the short side at most with which loader memory keeps images, None as in the file.
    `workers`: decoding threads per rank. `threads` None: the number of
    compute threads on a CPU is chosen by measuring.
    """

    recipe: Recipe
    data: str
    val: str | None = None
    labelled: str | None = None
    init: str | None = None
    init_digest: str | None = None
    budget_s: float | None = None
    deadline: float | None = None
    epochs: float | None = None
    seed: int = 0
    device: str = None  # type: ignore[assignment]  # never None once it is built, nor are the other three
    engine: str = None  # type: ignore[assignment]
    precision: str = None  # type: ignore[assignment]
    method: str = "recipe"
    loader: str = "native"
    memory_side: int | None = None
    crop: str = "kernels"
    workers: int = None  # type: ignore[assignment]
    threads: int | None = None
    prefetch: int = 2
    on_error: str = "fail"
    micro_batches: int | None = None
    recomputes: bool = False
    deterministic: bool = False
    log_every: int = 20
    checkpoint_s: float | None = None
    knn_bank: int = 10_000
    knn_at: tuple[float, ...] = ()
    quality_at: tuple[float, ...] = ()
    stop_on_collapse: bool = False
    profile: bool = False
    tensorboard: bool = True
    wandb: str | None = None

    def __post_init__(self) -> None:
        self._fill_in()
        require(self.device in ("cuda", "cpu"), f"device is {self.device!r}; give one of cuda, cpu")
        lengths = [length for length in (self.budget_s, self.deadline, self.epochs) if length is not None]
        require(
            len(lengths) == 1,
            f"the run has {len(lengths)} lengths; give one, a budget or a number of epochs: --budget 8h, --epochs 100",
        )
        self._check_ranges()
        if self.method != "auto":  # which chooses a recipe with a warm-up of its own
            self.check_warmup()
        require(self.on_error in ON_ERROR, f"on_error is {self.on_error!r}; give one of {', '.join(ON_ERROR)}")
        require(self.method in METHODS, f"method is {self.method!r}; give one of {', '.join(METHODS)}")
        LOADERS.check(self.loader)
        require(
            self.memory_side is None or self.loader == "memory",
            f"memory_side is for images that loader memory keeps, and the loader is {self.loader}; give --loader "
            "memory, or no --memory-side",
        )
        require(self.crop in CROPS, f"crop is {self.crop!r}; give one of {', '.join(CROPS)}")
        require(
            self.crop == "kernels" or (self.recipe.crop_ramp is None and self.parts == 1),
            "--crop dali crops whole batches to one size; give --crop kernels, or neither --crop-ramp nor "
            "--micro-batches",
        )
        require(
            self.crop == "kernels" or not self.recipe.local_views,
            f"--crop dali makes crops of one size, and the {len(self.recipe.local_views)} local views have their own; "
            "give --crop kernels, or no local views",
        )
        for name in ("knn_at", "quality_at"):
            flag = f"--{name.replace('_', '-')}"
            for share in getattr(self, name):
                require(
                    0 < share < 1, f"{name} has {share}; give shares of the run between 0 and 1, as in {flag} 0.25,0.5"
                )
        require(
            not self.knn_at or self.val is not None,
            "--knn-at needs labelled images to score on; give --val, or --quality-at instead of --knn-at",
        )
        require(
            self.labelled is None or self.val is not None,
            "--labelled holds the neighbours of the images of --val; give --val, or no --labelled",
        )
        require(
            self.parts >= 1 and self.recipe.batch_size >= 2 * self.parts,
            f"{self.micro_batches} micro-batches of a batch of {self.recipe.batch_size}; batch norm needs at least "
            f"2 images in each, so give 1 to {self.recipe.batch_size // 2}",
        )
        require(
            self.parts == 1 or not self.recipe.lagged_target,
            f"a lagged target moves with every forward, and a step of {self.parts} micro-batches has {self.parts}; "
            "leave out --lagged-target or --micro-batches",
        )

    def _check_ranges(self) -> None:
        """Check the numbers and texts that stand for themselves."""
        for name in ("data", "val", "labelled", "init", "wandb"):
            check_text(name, getattr(self, name))
        for name, most in (("budget_s", SECONDS_MAX), ("checkpoint_s", SECONDS_MAX), ("epochs", EPOCHS_MAX)):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0, most, is_above=True)
        if self.deadline is not None:
            check_number("deadline", self.deadline, 0, SECONDS_MAX)
        require(0 <= self.seed < 2**63, f"seed is {self.seed}; give a whole number from 0 to 2^63 - 1")
        for name, least, most in (
            ("workers", 1, THREADS_MAX),
            ("threads", 1, THREADS_MAX),
            ("prefetch", 1, BATCHES_MAX),
            ("memory_side", 8, COUNT_MAX),
            ("log_every", 1, COUNT_MAX),
            ("knn_bank", 1, COUNT_MAX),
        ):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), least, most)

    def end_s(self, elapsed_at: Callable[[float], float]) -> float | None:
        """Return when the run ends, in its own seconds, which `elapsed_at` gives of a Unix time; None by epochs."""
        return self.budget_s if self.deadline is None else elapsed_at(self.deadline)

    def check_warmup(self) -> None:
        """Raise ConfigError where the warm-up takes all the epochs."""
        require(
            self.epochs is None or self.recipe.optim.warmup_epochs < self.epochs,
            f"epochs is {self.epochs or 0:g}, not more than the {self.recipe.optim.warmup_epochs:g} epochs of warm-up; "
            "give more --epochs or fewer --warmup-epochs",
        )

    def _fill_in(self) -> None:
        """Look up a recipe given by its name, and replace what is None and follows from the machine."""
        if isinstance(self.recipe, str):
            object.__setattr__(self, "recipe", _above("recipes").named(self.recipe))
        require(isinstance(self.recipe, Recipe), f"recipe is {self.recipe!r}; give a Recipe, or the name of one")
        if None in (self.device, self.engine, self.precision, self.workers):
            suggested = _above("train.machine").suggest(self.device)
            if self.recipe.objective.loss in EAGER:
                suggested["engine"] = "eager"
            for name, value in suggested.items():
                if getattr(self, name) is None:
                    object.__setattr__(self, name, value)

    @staticmethod
    def from_file(path: Path | str, changes: Mapping[str, Any] | None = None) -> Config:
        """Read a .toml or .json file, a run folder's config.json included; changes: settings that replace its own.

        Raises ConfigError, also for a setting that is unknown, with the nearest one.
        """
        found: Config = _above("recipes.config_file").load(Path(path), changes or {})
        return found

    @property
    def score_shares(self) -> set[float]:
        """The shares of the run at which the encoder is scored, besides its start and end."""
        return {*self.knn_at, *self.quality_at}

    @property
    def parts(self) -> int:
        """The number of micro-batches; 1 while it has not been chosen."""
        return 1 if self.micro_batches is None else self.micro_batches


def _above(module: str) -> Any:
    """Import a module of fastbyol that imports this one."""
    return importlib.import_module(f"fastbyol.{module}")


def to_json(config: Config) -> str:
    """Format a configuration as JSON, one setting per line."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def in_place(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as nested tables, the optimiser within the recipe; version 0.1 wrote it beside that.

    Settings of a recipe that are gone are left out where they changed nothing; with another value they are unknown.
    """
    recipe = settings.get("recipe")
    if not isinstance(recipe, Mapping):
        return dict(settings)
    known = {name: value for name, value in recipe.items() if (name, value) not in GONE.items()}
    rest = {name: value for name, value in settings.items() if name != "optimizer"} | {"recipe": known}
    if "optimizer" not in settings:
        return rest
    return tables.merge(rest, {"recipe": {"optim": {"optimizer": settings["optimizer"]}}})


def from_json(text: str) -> Config:
    """Parse the output of to_json; raise ConfigError if a setting is unknown, missing or out of range."""
    try:
        found = json.loads(text)
        require(isinstance(found, dict), f"it holds a {type(found).__name__}; wanted an object of settings")
        return tables.build(Config, in_place(found))
    except ValueError as error:
        raise ConfigError(f"not a configuration of this version of fastbyol: {error}") from error
