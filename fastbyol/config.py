"""Know what a run is made of: frozen, narrow dataclasses, checked when they are built."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any


class ConfigError(ValueError):
    """Tell the user which setting is wrong: what came, what was wanted and what to do."""


TARGET_STATISTICS = ("batch", "running")
OPTIMIZERS = ("lars", "apex-larc")
LOADERS = ("native", "memory", "ffcv", "dali")
CROPS = ("kernels", "dali")
ON_ERROR = ("fail", "skip")  # of a sample that does not decode
TARGETS = ("ema", "constant", "stop-gradient", "online")
NORMALIZATIONS = ("l2", "layernorm", "batchnorm", "none")


def require(claim: bool, message: str) -> None:
    """Raise ConfigError(message) unless the claim holds."""
    if not claim:
        raise ConfigError(message)


@dataclass(frozen=True)
class ViewConfig:
    """Describe the distribution of one view; the defaults are T of the paper (appendix B).

    Probabilities lie in [0, 1]; `area` is a fraction of the image; `ratio` is width / height, drawn log-uniformly;
    strengths are half-widths of uniform distributions; `sigma` is in pixels of the output view.
    """

    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale: float = 0.2
    blur: float = 1.0
    sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "grayscale", "blur", "solarize"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"view probability {name} is {value}; give a number from 0 to 1")
        for name in ("area", "ratio", "sigma"):
            low, high = getattr(self, name)
            require(0 < low <= high < math.inf, f"view range {name} is ({low}, {high}); give 0 < low <= high")
        require(self.area[1] <= 1, f"view area ends at {self.area[1]}; a crop cannot exceed the image: give at most 1")
        for name in ("brightness", "contrast", "saturation", "hue"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"view strength {name} is {value}; give a number from 0 to 1")


@dataclass(frozen=True)
class EncoderConfig:
    """Name a ResNet: a key of encoder.ARCHS, a multiplier of every layer's channels, a key of encoder.STEMS."""

    arch: str = "resnet50"
    width: float = 1
    stem: str = "imagenet"

    def __post_init__(self) -> None:
        require(0 < self.width < math.inf, f"width is {self.width}; give a multiplier of the channels above 0")


@dataclass(frozen=True)
class HeadConfig:
    """Give the sizes of projector and predictor: depth - 1 times Linear(hidden) -> BN -> ReLU, then Linear(out).

    The depths count linear layers (paper, appendix F.1): 1 to 3; a predictor of depth 0 is no predictor.
    """

    hidden: int = 4096
    out: int = 256
    projector_depth: int = 2
    predictor_depth: int = 2

    def __post_init__(self) -> None:
        for name in ("hidden", "out"):
            value = getattr(self, name)
            require(value >= 1, f"head size {name} is {value}; give at least 1")
        for name, least in (("projector_depth", 1), ("predictor_depth", 0)):
            value = getattr(self, name)
            require(value in range(least, 4), f"{name} is {value}; give a number of linear layers from {least} to 3")


@dataclass(frozen=True)
class ObjectiveConfig:
    """Say what is minimised; the defaults are BYOL's. Source: paper, section 5 and appendix F.4 to F.6.

    `target`: where the second view's projection comes from. "ema": the target network, which follows the online one;
    "constant": a target network that never moves; "stop-gradient": the online network itself, without a gradient;
    "online": the same with its gradient. `normalization`: what makes projections comparable. `beta` weighs the
    negatives, at `temperature`: the other images of the batch or, with `queue` > 0, that many earlier target
    projections. Without predictor, beta 1 and target "online" are SimCLR, beta 1, "ema" and a queue MoCo.
    """

    target: str = "ema"
    normalization: str = "l2"
    beta: float = 0.0
    temperature: float = 0.1
    queue: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("target", self.target, TARGETS),
            ("normalization", self.normalization, NORMALIZATIONS),
        ):
            require(value in known, f"{name} is {value!r}; give one of {', '.join(known)}")
        require(0 <= self.beta < math.inf, f"beta is {self.beta}; give a weight of the negatives from 0")
        require(0 < self.temperature < math.inf, f"temperature is {self.temperature}; give more than 0")
        require(
            self.normalization == "l2" or self.beta == 0,
            f"negatives are compared by cosine, not by normalization {self.normalization}; give beta 0 or l2",
        )
        require(self.queue >= 0, f"queue is {self.queue}; give a number of projections, 0 for none")
        require(
            self.queue == 0 or (self.beta > 0 and self.target in ("ema", "constant")),
            f"a queue of {self.queue} with beta {self.beta:g} and target {self.target} is never used; "
            "give beta above 0 and target ema or constant",
        )

    @property
    def has_target(self) -> bool:
        """Tell whether there is a target network beside the online one."""
        return self.target in ("ema", "constant")


@dataclass(frozen=True)
class OptimConfig:
    """Give the peaks of the schedules and the constants of LARS.

    `base_lr` is the peak per 256 images of batch; `tau_base` the target rate at the start, which rises to 1 unless
    `tau_rises` is False; the learning rate rises linearly over `warmup_epochs`.
    """

    base_lr: float
    weight_decay: float
    tau_base: float
    warmup_epochs: float = 10
    momentum: float = 0.9
    trust: float = 1e-3
    tau_rises: bool = True

    def __post_init__(self) -> None:
        for name in ("base_lr", "weight_decay", "warmup_epochs"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"{name} is {value}; give a number from 0")
        require(0 <= self.tau_base <= 1, f"tau_base is {self.tau_base}; give a number from 0 to 1")
        require(0 < self.trust < math.inf, f"trust is {self.trust}; give a factor of LARS above 0")
        require(0 <= self.momentum < 1, f"momentum is {self.momentum}; give a number from 0 up to, not including, 1")


@dataclass(frozen=True)
class Preset:
    """Give the base learning rate and the target's base rate that suit a run of so many epochs."""

    epochs: float
    base_lr: float
    tau_base: float

    def __post_init__(self) -> None:
        require(0 < self.epochs < math.inf, f"a preset for {self.epochs} epochs; give more than 0")
        require(0 <= self.base_lr < math.inf, f"a preset with base_lr {self.base_lr}; give a number from 0")
        require(0 <= self.tau_base <= 1, f"a preset with tau_base {self.tau_base}; give a number from 0 to 1")


@dataclass(frozen=True)
class CropRamp:
    """Begin with smaller views: `sizes_px` for equal shares of the run up to progress `until`, full size after it."""

    sizes_px: tuple[int, ...]
    until: float = 0.6

    def __post_init__(self) -> None:
        require(bool(self.sizes_px), "a crop ramp without sizes; give at least one side in pixels")
        require(min(self.sizes_px, default=8) >= 8, f"crop ramp {self.sizes_px}; give sides of at least 8 pixels")
        require(0 < self.until < 1, f"a crop ramp until {self.until}; give a share of the run between 0 and 1")

    @classmethod
    def between(cls, start_px: int, full_px: int) -> CropRamp:
        """Step from `start_px` to `full_px` in three equal rises, by multiples of 32 px, or of 4 for small views."""
        require(8 <= start_px < full_px, f"a crop ramp from {start_px} px; give 8 up to, not including, {full_px} px")
        multiple = 32 if full_px >= 128 else 4
        rises = (start_px + (full_px - start_px) * number / 3 for number in range(1, 3))
        between = {round(px / multiple) * multiple for px in rises}
        return cls((start_px, *sorted(px for px in between if start_px < px < full_px)))


@dataclass(frozen=True)
class Recipe:
    """Say what is trained: network, views, optimisation and their sizes.

    `epochs` is the length the constants were chosen for, `presets` what to use for other lengths; `crop_px` the side
    of a training view, `eval_px` of an evaluation view, which shows the centre square of share `eval_margin` of the
    short side. Departures from the paper: `target_statistics` "running" lets the target normalise by an EMA of the
    online network's running statistics instead of its own batches'; `lagged_target` moves the target in the launch of
    the loss, one step late; `crop_ramp` begins with smaller views; `recalibrate` batches renew the running statistics
    when training has ended, 0 leaves them.
    """

    name: str
    encoder: EncoderConfig
    head: HeadConfig
    views: tuple[ViewConfig, ViewConfig]
    optim: OptimConfig
    crop_px: int
    batch_size: int
    epochs: float
    eval_px: int
    eval_margin: float = 1.0
    target_statistics: str = "batch"
    lagged_target: bool = False
    presets: tuple[Preset, ...] = ()
    crop_ramp: CropRamp | None = None
    recalibrate: int = 0
    objective: ObjectiveConfig = ObjectiveConfig()

    def __post_init__(self) -> None:
        require(
            self.target_statistics in TARGET_STATISTICS,
            f"target statistics {self.target_statistics!r}; choose one of {', '.join(TARGET_STATISTICS)}",
        )
        require(self.batch_size >= 2, f"batch size is {self.batch_size}; batch norm needs at least 2 images")
        for name in ("crop_px", "eval_px"):
            value = getattr(self, name)
            require(value >= 8, f"{name} is {value}; give at least 8")
        require(0 < self.eval_margin <= 1, f"eval_margin is {self.eval_margin}; give a share of the short side up to 1")
        require(0 < self.epochs < math.inf, f"a recipe of {self.epochs} epochs; give more than 0")
        require(self.recalibrate >= 0, f"recalibrate is {self.recalibrate}; give a number of batches from 0")
        goal = self.objective
        require(
            goal.target == "ema" or not (self.lagged_target or self.target_statistics == "running"),
            f"target {goal.target} follows nothing; give neither --lagged-target nor --target-statistics running",
        )
        require(
            (goal.normalization, goal.beta) == ("l2", 0) or not self.lagged_target,
            "--lagged-target moves the target in the launch of BYOL's own loss; give normalization l2 and beta 0",
        )
        require(
            goal.queue == 0 or goal.queue >= 2 * self.batch_size,
            f"a queue of {goal.queue} holds less than a batch of {self.batch_size} leaves in it; "
            f"give at least {2 * self.batch_size}",
        )

    @property
    def peak_lr(self) -> float:
        """Scale the base learning rate linearly with the batch: base * batch / 256."""
        return self.optim.base_lr * self.batch_size / 256


@dataclass(frozen=True)
class Config:
    """Say what one run does: the recipe, its data, its length and its place.

    The length is one of `budget_s`, seconds over all processes of the run; `deadline`, a Unix time; and `epochs`.
    `checkpoint_s` None lets the measured cost of a checkpoint decide how often one is written. `knn_at`: shares of the
    run at which the encoder is scored on `val`, beside those at its start and end. `workers`: threads a rank decodes
    with; fastbyol-train fills in loaders.default_workers, from Python it is 2 unless given.
    """

    recipe: Recipe
    data: str
    val: str | None = None
    budget_s: float | None = None
    deadline: float | None = None
    epochs: float | None = None
    seed: int = 0
    device: str = "cpu"
    engine: str = "eager"
    precision: str = "float32"
    optimizer: str = "lars"
    loader: str = "native"
    crop: str = "kernels"
    workers: int = 2
    prefetch: int = 2
    on_error: str = "fail"
    micro_batches: int = 1
    log_every: int = 20
    checkpoint_s: float | None = None
    knn_bank: int = 10_000
    knn_at: tuple[float, ...] = ()
    stop_on_collapse: bool = False
    profile: bool = False
    tensorboard: bool = True
    wandb: str | None = None

    def __post_init__(self) -> None:
        lengths = [length for length in (self.budget_s, self.deadline, self.epochs) if length is not None]
        require(
            len(lengths) == 1,
            "a run needs a budget or a number of epochs, and not both; give --budget 8h or --epochs 100",
        )
        require(self.budget_s is None or 0 < self.budget_s < math.inf, f"budget is {self.budget_s} s; give more than 0")
        require(self.epochs is None or 0 < self.epochs < math.inf, f"epochs is {self.epochs}; give more than 0")
        require(0 <= self.seed < 2**63, f"seed is {self.seed}; give a whole number from 0 to 2^63 - 1")
        require(
            self.epochs is None or self.recipe.optim.warmup_epochs < self.epochs,
            f"{self.epochs or 0:g} epochs do not outlast the warm-up of "
            f"{self.recipe.optim.warmup_epochs:g}; give more epochs or a shorter --warmup-epochs",
        )
        require(self.optimizer in OPTIMIZERS, f"no optimizer {self.optimizer!r}; choose one of {', '.join(OPTIMIZERS)}")
        require(self.workers >= 1, f"workers is {self.workers}; give at least 1")
        require(self.prefetch >= 1, f"prefetch is {self.prefetch}; give at least 1 batch")
        require(self.on_error in ON_ERROR, f"on_error is {self.on_error!r}; choose one of {', '.join(ON_ERROR)}")
        require(self.loader in LOADERS, f"no loader {self.loader!r}; choose one of {', '.join(LOADERS)}")
        require(self.crop in CROPS, f"no crop by {self.crop!r}; choose one of {', '.join(CROPS)}")
        require(
            self.crop == "kernels" or (self.recipe.crop_ramp is None and self.micro_batches == 1),
            "DALI crops whole batches to one size; give --crop kernels, or neither --crop-ramp nor --micro-batches",
        )
        require(self.log_every >= 1, f"log_every is {self.log_every}; give at least 1")
        require(self.knn_bank >= 1, f"knn_bank is {self.knn_bank}; give at least 1 image")
        for share in self.knn_at:
            require(
                0 < share < 1, f"a score at {share} of the run; give shares between 0 and 1, as in --knn-at 0.25,0.5"
            )
        require(
            not self.knn_at or self.val is not None,
            "scores in the midst of training need labelled images; give --val, or no --knn-at",
        )
        require(
            self.checkpoint_s is None or self.checkpoint_s > 0,
            f"checkpoint_s is {self.checkpoint_s}; give more than 0 seconds",
        )
        require(
            self.micro_batches >= 1 and self.recipe.batch_size >= 2 * self.micro_batches,
            f"{self.micro_batches} micro-batches of a batch of {self.recipe.batch_size}; batch norm needs at least "
            "2 images in each",
        )
        require(
            self.micro_batches == 1 or self.engine != "graph",
            "a CUDA graph holds a step on a whole batch; give --engine eager or compile with --micro-batches",
        )
        require(
            self.micro_batches == 1 or not self.recipe.lagged_target,
            "a lagged target moves with every forward, which micro-batches repeat; leave one of the two out",
        )


def to_json(config: Config) -> str:
    """Write a configuration as JSON, one setting a line."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    """Read what to_json wrote; raise ConfigError where a setting is unknown, missing or out of range."""
    try:
        fields = json.loads(text)
        recipe = dict(fields.pop("recipe"))
        first, second = (ViewConfig(**_tuples(view)) for view in recipe.pop("views"))
        ramp = recipe.pop("crop_ramp", None)
        return Config(
            recipe=Recipe(
                encoder=EncoderConfig(**recipe.pop("encoder")),
                head=HeadConfig(**recipe.pop("head")),
                optim=OptimConfig(**recipe.pop("optim")),
                objective=ObjectiveConfig(**recipe.pop("objective", {})),  # absent from folders of 0.1
                views=(first, second),
                presets=tuple(Preset(**preset) for preset in recipe.pop("presets", ())),
                crop_ramp=None if ramp is None else CropRamp(**_tuples(ramp)),
                **recipe,
            ),
            **_tuples(fields),
        )
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ConfigError(f"this is not a configuration of this version of fastbyol: {error}") from error


def _tuples(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
