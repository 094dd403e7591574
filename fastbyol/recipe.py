"""A training recipe: frozen dataclasses of its networks, views, loss and optimisation that check their values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fastbyol import ranges
from fastbyol.errors import ConfigError, require
from fastbyol.ranges import FLOAT32_SAFE, check_number
from fastbyol.registry import ENCODERS, OBJECTIVES, OPTIMIZERS

TARGET_STATISTICS = ("batch", "running")
TARGETS = ("ema", "constant", "stop-gradient", "online")
NORMALIZATIONS = ("l2", "layernorm", "batchnorm", "none")
CHANNELS = (1, 3)  # of images: a .beton holds RGB, from which gray is computed
PADDINGS = ("symmetric", "same")
LOSS_SETTINGS = {  # of ObjectiveConfig, by the loss that reads them
    "byol": ("normalization", "beta", "temperature", "queue", "fade", "beta_end", "decoupled"),
    "vicreg": ("invariance", "variance", "covariance"),
    "coding-rate": ("similarity", "distortion"),
}
EAGER = ("coding-rate",)  # losses that no CUDA graph holds
WITHOUT_TARGET = ("vicreg", "coding-rate")  # losses of the online network's projections alone
BASE_BATCH = 256  # images, for which a base learning rate is given


def scale_lr(base_lr: float, *, batch_size: int) -> float:
    """Return the learning rate of a batch: proportional to its size (Goyal et al. 2017)."""
    return base_lr * batch_size / BASE_BATCH


@dataclass(frozen=True)
class ViewConfig:
    """The distribution of one view; the defaults are T of the paper (appendix B).

    Probabilities lie in [0, 1]; `area` is a fraction of the image; `ratio` is width / height, drawn log-uniformly;
    strengths are half-widths of uniform distributions; `sigma` is in pixels of the output view. `local_px`: the side of
    a local view, which the online network alone sees; None for a global view, whose side is the recipe's.
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
    local_px: int | None = None

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "grayscale", "blur", "solarize"):
            check_number(f"view probability {name}", getattr(self, name), 0, 1)
        for name in ("area", "ratio", "sigma"):
            low, high = getattr(self, name)
            require(
                0 < low <= high <= FLOAT32_SAFE,
                f"view range {name} is ({low}, {high}); give 0 < low <= high <= {FLOAT32_SAFE:g}",
            )
        require(self.area[1] <= 1, f"view area ends at {self.area[1]}; a crop cannot exceed the image: give at most 1")
        for name in ("brightness", "contrast", "saturation", "hue"):
            check_number(f"view strength {name}", getattr(self, name), 0, 1)
        if self.local_px is not None:
            check_number("local_px", self.local_px, 8, ranges.SIDE_MAX)


@dataclass(frozen=True)
class EncoderConfig:
    """An encoder: its name among ENCODERS, a multiplier of every layer's channels, a stem (of encoder.STEMS).

    `channels`: of the images. `frozen`: the names of parameters that stay as they were drawn, or what these begin with,
    separated by spaces; "patch_embed" keeps a ViT's random projection of patches.
    `padding` of ResNets: "symmetric" as in torchvision; "same" as in TensorFlow and JAX, whose layers of stride 2 pad
    an even side less at its beginning than at its end, as DeepMind's released networks do.
    """

    arch: str = "resnet50"
    width: float = 1
    stem: str = "imagenet"
    channels: int = 3
    frozen: str = ""
    padding: str = "symmetric"

    def __post_init__(self) -> None:
        ENCODERS.check(self.arch)
        check_number("width", self.width, 0, ranges.WIDTH_MAX, is_above=True)
        require(self.channels in CHANNELS, f"channels is {self.channels}; give 3 for RGB or 1 for gray images")
        require(self.padding in PADDINGS, f"padding is {self.padding!r}; give one of {', '.join(PADDINGS)}")


@dataclass(frozen=True)
class HeadConfig:
    """The sizes of projector and predictor: depth - 1 times Linear(hidden) -> BN -> ReLU, then Linear(out).

    The depths count linear layers (paper, appendix F.1), 1 to 3; predictor depth 0 means no predictor.
    `local_predictor`: local views have a predictor of their own, of the same sizes.
    """

    hidden: int = 4096
    out: int = 256
    projector_depth: int = 2
    predictor_depth: int = 2
    local_predictor: bool = False

    def __post_init__(self) -> None:
        for name in ("hidden", "out"):
            check_number(f"head size {name}", getattr(self, name), 1, ranges.SIZE_MAX)
        for name, least in (("projector_depth", 1), ("predictor_depth", 0)):
            value = getattr(self, name)
            require(value in range(least, 4), f"{name} is {value}; give a number of linear layers from {least} to 3")
        require(
            not self.local_predictor or self.predictor_depth > 0,
            "local_predictor with a predictor_depth of 0, which is none; give 1 to 3 layers, or no local_predictor",
        )


def _as_change(settings: Mapping[str, object]) -> str:
    """Write settings as a change of a recipe does: setting=value+setting=value."""
    return "+".join(f"{name}={value}".lower() for name, value in settings.items())


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss to minimise; the defaults are BYOL's. Source: paper, section 5 and appendix F.4 to F.6.

    `loss`: its name among OBJECTIVES. `target`: where the second view's projection comes from. "ema": the target
    network, which follows the online network; "constant": a target network that never moves; "stop-gradient": the
    online network, without a gradient; "online": the online network with its gradient. The rest are settings of one
    loss each, see LOSS_SETTINGS; a loss of your own may read all of them.

    Loss "byol". `normalization`: of the projections, before they are compared.
    `beta`: weight of the negatives, at `temperature`. Negatives are the other images of the batch or, with `queue` > 0,
    that many earlier target projections. Without a predictor, beta 1 and target "online" are SimCLR; beta 1, target
    "ema" and a queue are MoCo. `fade`: the share of the run over which beta goes to `beta_end` by a half cosine, to
    start as a contrastive method and end as BYOL; 0 keeps beta. `decoupled`: an image's other view is none of its
    negatives, for which small batches are enough (Yeh et al. 2022, arXiv 2110.06848).

    Losses "vicreg" and "coding-rate" need neither negatives nor a target: they keep the projections of a batch spread
    over all dimensions, with target "online" and without a predictor. "vicreg": the weights `invariance`, `variance`
    and `covariance` of its terms (arXiv 2105.04906). "coding-rate": the weight `similarity` of the views' agreement
    against the total coding rate, up to the squared distortion `distortion` (arXiv 2304.03977).
    """

    target: str = "ema"
    normalization: str = "l2"
    beta: float = 0.0
    temperature: float = 0.1
    queue: int = 0
    loss: str = "byol"
    fade: float = 0.0
    beta_end: float = 0.0
    decoupled: bool = False
    invariance: float = 25.0
    variance: float = 25.0
    covariance: float = 1.0
    similarity: float = 200.0
    distortion: float = 0.2

    def __post_init__(self) -> None:
        OBJECTIVES.check(self.loss)
        self._check_loss()
        for name, value, known in (
            ("target", self.target, TARGETS),
            ("normalization", self.normalization, NORMALIZATIONS),
        ):
            require(value in known, f"{name} is {value!r}; give one of {', '.join(known)}")
        check_number("beta", self.beta, 0, FLOAT32_SAFE)
        check_number("temperature", self.temperature, 0, FLOAT32_SAFE, is_above=True)
        require(
            self.normalization == "l2" or self.beta == 0,
            f"negatives are compared by cosine, not by normalization {self.normalization}; give beta 0 or l2",
        )
        require(0 <= self.fade <= 1, f"fade is {self.fade}; give a share of the run from 0, for a constant beta, to 1")
        check_number("beta_end", self.beta_end, 0, FLOAT32_SAFE)
        require(
            self.beta > 0 or not (self.fade or self.beta_end or self.decoupled),
            "fade, beta_end and decoupled are of negatives, and beta 0 has none; give beta above 0, or none of them",
        )
        require(
            self.fade > 0 or self.beta_end == 0,
            f"beta_end is {self.beta_end:g} without a share of the run to reach it in; give fade above 0",
        )
        require(
            self.fade == 0 or self.loss == "byol",
            f"fade moves the beta of loss byol, not of {self.loss}; give fade 0 or loss byol",
        )
        check_number("queue", self.queue, 0, ranges.COUNT_MAX)
        require(
            self.queue == 0 or (self.beta > 0 and self.target in ("ema", "constant")),
            f"a queue of {self.queue} is not used with beta {self.beta:g} and target {self.target}; "
            "give beta above 0 and target ema or constant",
        )

    def _check_loss(self) -> None:
        """Check the settings that are of one loss, and what the losses without a target ask for."""
        for name in ("invariance", "variance", "covariance", "similarity"):
            check_number(name, getattr(self, name), 0, FLOAT32_SAFE)
        check_number("distortion", self.distortion, 0, FLOAT32_SAFE, is_above=True)
        others = LOSS_SETTINGS if self.loss in LOSS_SETTINGS else {}
        for other, names in others.items():
            usual = {name: getattr(type(self), name) for name in names if other != self.loss}
            given = {name: getattr(self, name) for name in usual if getattr(self, name) != usual[name]}
            if given:
                raise ConfigError(
                    f"loss {self.loss} does not read {_as_change(given)}, which is of loss {other}; give "
                    f"{_as_change({name: usual[name] for name in given})}, or loss={other}"
                )
        require(
            self.loss not in WITHOUT_TARGET or self.target == "online",
            f"loss {self.loss} is of the online network's projections of both views, and the target is {self.target}; "
            "give target online and predictor_depth 0",
        )

    @property
    def has_target(self) -> bool:
        """Tell whether there is a target network besides the online network."""
        return self.target in ("ema", "constant")

    @property
    def moves_target(self) -> bool:
        """Tell whether the target network is a moving average of the online one, at the rate tau."""
        return self.target == "ema"


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser, its name among OPTIMIZERS, the peaks of its schedules and its constants.

    `base_lr`: peak learning rate per 256 images of batch, reached linearly over `warmup_epochs`. `tau_base`: the
    target's EMA rate at the start, which rises to 1 unless `tau_rises` is False. `momentum`: AdamW's beta 1.
    `trust`: LARS's trust coefficient. `predictor_lr_scale`: multiplies the predictor's learning rate.
    """

    base_lr: float
    weight_decay: float
    tau_base: float
    warmup_epochs: float = 10
    momentum: float = 0.9
    trust: float = 1e-3
    tau_rises: bool = True
    optimizer: str = "lars"
    predictor_lr_scale: float = 1.0

    def __post_init__(self) -> None:
        OPTIMIZERS.check(self.optimizer)
        for name in ("base_lr", "weight_decay", "warmup_epochs"):
            check_number(name, getattr(self, name), 0, FLOAT32_SAFE)
        check_number("tau_base", self.tau_base, 0, 1)
        check_number("trust", self.trust, 0, FLOAT32_SAFE, is_above=True)
        check_number("predictor_lr_scale", self.predictor_lr_scale, 0, ranges.LR_SCALE_MAX, is_above=True)
        require(0 <= self.momentum < 1, f"momentum is {self.momentum}; give a number from 0 up to, not including, 1")


@dataclass(frozen=True)
class Preset:
    """The base learning rate and base tau for a run of `epochs` epochs."""

    epochs: float
    base_lr: float
    tau_base: float

    def __post_init__(self) -> None:
        check_number("preset epochs", self.epochs, 0, ranges.EPOCHS_MAX, is_above=True)
        check_number("preset base_lr", self.base_lr, 0, FLOAT32_SAFE)
        check_number("preset tau_base", self.tau_base, 0, 1)


@dataclass(frozen=True)
class CropRamp:
    """Smaller views early on: each of `sizes_px` for an equal share of progress 0 to `until`, then full size."""

    sizes_px: tuple[int, ...]
    until: float = 0.6

    def __post_init__(self) -> None:
        require(bool(self.sizes_px), "crop ramp has no sizes; give at least one side in pixels")
        require(min(self.sizes_px, default=8) >= 8, f"crop ramp is {self.sizes_px}; give sides of at least 8 pixels")
        require(0 < self.until < 1, f"crop ramp lasts until {self.until}; give a share of the run between 0 and 1")

    @classmethod
    def between(cls, start_px: int, full_px: int) -> CropRamp:
        """Build a ramp from `start_px` to `full_px` in three equal steps, rounded to 32 px, or to 4 for small views."""
        require(
            8 <= start_px < full_px, f"crop ramp starts at {start_px} px; give 8 up to, not including, {full_px} px"
        )
        multiple = 32 if full_px >= 128 else 4
        thirds = (start_px + (full_px - start_px) * number / 3 for number in range(1, 3))
        rounded = {round(px / multiple) * multiple for px in thirds}
        return cls((start_px, *sorted(px for px in rounded if start_px < px < full_px)))


@dataclass(frozen=True)
class Recipe:
    """A training recipe: networks, views, loss, optimisation and their sizes.

    `views`: how each view of an image is drawn: two global ones or more, then the local ones, all of one size. A view's
    prediction is compared with the mean of the target projections of the other global views.
    `epochs`: the length the constants were chosen for; `presets`: rates for other lengths. `crop_px`: side of a
    training view; `eval_px`: side of an evaluation view, the centre square whose side is `eval_margin` times the
    image's short side. Departures from the paper: with `target_statistics` "running" the target normalises by an EMA of
    the online network's running statistics instead of its own batch statistics; `lagged_target` moves the target in the
    kernel launch of the loss, one step late; `crop_ramp` starts with smaller views; `recalibrate`: batches from which
    the running statistics are computed anew after training, 0 for none.
    """

    name: str
    encoder: EncoderConfig
    head: HeadConfig
    views: tuple[ViewConfig, ...]
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
            f"target_statistics is {self.target_statistics!r}; give one of {', '.join(TARGET_STATISTICS)}",
        )
        require(self.name.isprintable() and self.name != "", f"the recipe's name is {self.name!r}; give a line of text")
        self._check_views()
        require(
            2 <= self.batch_size <= ranges.COUNT_MAX,
            f"batch size is {self.batch_size}; batch norm needs at least 2 images; give 2 to {ranges.COUNT_MAX}",
        )
        for name in ("crop_px", "eval_px"):
            check_number(name, getattr(self, name), 8, ranges.SIDE_MAX)
        largest = 0 if self.crop_ramp is None else max(self.crop_ramp.sizes_px)
        require(
            largest < self.crop_px,
            f"crop ramp has a side of {largest} px, and views have {self.crop_px} px in the end; give smaller ones",
        )
        require(0 < self.eval_margin <= 1, f"eval_margin is {self.eval_margin}; give a share of the short side up to 1")
        check_number("the recipe's epochs", self.epochs, 0, ranges.EPOCHS_MAX, is_above=True)
        check_number("recalibrate", self.recalibrate, 0, ranges.BATCHES_MAX)
        objective = self.objective
        require(
            objective.target == "ema" or not (self.lagged_target or self.target_statistics == "running"),
            f"target {objective.target} does not follow the online network; give target ema, or neither "
            "--lagged-target nor --target-statistics running",
        )
        require(
            (objective.loss, objective.normalization, objective.beta) == ("byol", "l2", 0) or not self.lagged_target,
            f"--lagged-target with loss {objective.loss}, normalization {objective.normalization} and beta "
            f"{objective.beta:g}, but it needs BYOL's own loss; give loss byol, normalization l2 and beta 0",
        )
        require(
            objective.loss not in WITHOUT_TARGET or self.head.predictor_depth == 0,
            f"loss {objective.loss} has no target, so a predictor of depth {self.head.predictor_depth} has nothing to "
            "predict; give predictor_depth 0",
        )
        require(
            self.optim.predictor_lr_scale == 1 or self.head.predictor_depth > 0,
            f"predictor_lr_scale is {self.optim.predictor_lr_scale:g} with a predictor_depth of 0, which is none; give "
            "1 to 3 layers, or leave predictor_lr_scale out",
        )
        require(
            objective.queue == 0 or objective.queue >= 2 * self.batch_size,
            f"a queue of {objective.queue} is smaller than the projections of a batch of {self.batch_size}; "
            f"give at least {2 * self.batch_size}",
        )

    @property
    def drawn_views(self) -> tuple[ViewConfig, ...]:
        """The views as they are drawn: without what needs RGB where the encoder takes gray images."""
        if self.encoder.channels == 3:
            return self.views
        return tuple(replace(view, saturation=0.0, hue=0.0, grayscale=0.0) for view in self.views)

    @property
    def global_views(self) -> tuple[ViewConfig, ...]:
        """The views that both networks see."""
        return tuple(view for view in self.views if view.local_px is None)

    @property
    def local_views(self) -> tuple[ViewConfig, ...]:
        """The views that the online network alone sees."""
        return tuple(view for view in self.views if view.local_px is not None)

    def sizes_of_views(self, crop_px: int) -> list[tuple[int, int]]:
        """Return number and side in pixels of the global views, of crop_px, then of the local ones if there are any."""
        local = [view.local_px for view in self.local_views if view.local_px is not None]
        return [(len(self.global_views), crop_px), *([(len(local), local[0])] if local else [])]

    def _check_views(self) -> None:
        """Raise ConfigError for views that do not go together, or for more than two where the loss is of two alone."""
        count, goal, local = len(self.views), self.objective, self.local_views
        whole = count - len(local)
        require(whole >= 2, f"the recipe has {whole} views that are not local; give two or more")
        check_number("the number of views", count, 2, ranges.VIEWS_MAX)
        require(self.views[whole:] == local, "a local view comes before a global one; give the global views first")
        sides = sorted({view.local_px for view in local if view.local_px is not None})
        require(len(sides) <= 1, f"local views have sides of {sides} px; give one local_px to all of them")
        require(
            bool(local) or not self.head.local_predictor,
            "local_predictor is of local views, and there are none; give local_views=4, or leave it out",
        )
        require(
            count == 2 or goal.loss == "byol",
            f"loss {goal.loss} with {count} views, but losses other than byol are of two; give loss byol, or two views",
        )
        require(
            count == 2 or goal.beta == 0,
            f"negatives (beta {goal.beta:g}) with {count} views, but they are defined for two, as in SimCLR and MoCo; "
            "give beta 0, or two views",
        )
        require(
            count == 2 or not self.lagged_target,
            f"--lagged-target with {count} views, but its kernel compares two; leave it out, or give two views",
        )
