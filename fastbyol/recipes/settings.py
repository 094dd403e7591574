"""What every setting of a run means, the values it takes and the source of the usual one, by its place in a file.

"P" is the paper (arXiv 2006.07733v3), "DM" its authors' released code; a setting without a source is fastbyol's own.
"""

from __future__ import annotations

from typing import NamedTuple

from fastbyol.config import CROPS, ENGINES, METHODS, NORMALIZATIONS, ON_ERROR, PRECISIONS, TARGET_STATISTICS, TARGETS
from fastbyol.ranges import BATCHES_MAX, LR_SCALE_MAX, SIDE_MAX, SIZE_MAX, THREADS_MAX, WIDTH_MAX
from fastbyol.recipe import CHANNELS, PADDINGS
from fastbyol.registry import ENCODERS, LOADERS, OBJECTIVES, OPTIMIZERS, Registry


class About(NamedTuple):
    """What a setting means, its values in words, and the source of its usual value, if it has one."""

    meaning: str
    values: str
    source: str = ""

    def __str__(self) -> str:
        """Say all in one line."""
        return f"{self.meaning}; {self.values}" + (f" ({self.source})" if self.source else "")


def _one_of(names: tuple[str, ...]) -> str:
    return ", ".join(names)


def _parts(parts: Registry) -> str:
    return f"{', '.join(parts)}, or your module:attribute"


PROBABILITY, ABOVE, FROM_ZERO, FROM_ONE, SWITCH = "0 to 1", "above 0", "0 or more", "1 or more", "true or false"
SIDE, SIZE, NUMBER_OF_THREADS = f"8 to {SIDE_MAX}", f"1 to {SIZE_MAX}", f"1 to {THREADS_MAX}"
OF_BATCHES = f"to {BATCHES_MAX}"
PLACE = "a path or an address"
WEIGHTS = "a run, a checkpoint, an encoder's file, torchvision:NAME or timm:NAME"
VIEWS, NEGATIVES = "P appendix B, table 6", "P appendix F.4"
VICREG, EMP_SSL = "arXiv 2105.04906", "arXiv 2304.03977"

RUN = {
    "data": About("training images", PLACE),
    "val": About("labelled images to score on", PLACE),
    "labelled": About("labelled images among which kNN looks for neighbours", PLACE),
    "init": About("weights that both networks start from, in place of drawn ones", WEIGHTS),
    "init_digest": About("digest of those weights, which the run fills in", "a text"),
    "budget": About("wall-clock from process start to exit", '"90s", "8h", "until TIME", "slurm"'),
    "budget_s": About("the budget in seconds", ABOVE),
    "deadline": About("the end of the run as a Unix time", "seconds since 1970"),
    "epochs": About("passes over the training images, in place of a budget", ABOVE),
    "seed": About("seed of weights, order and views", "0 to 2^63 - 1"),
    "device": About("where to train", "cuda, cpu"),
    "engine": About("how a step runs", _one_of(ENGINES)),
    "precision": About("number format of the networks", _one_of(PRECISIONS)),
    "method": About("the recipe's own method, or the one that has won at the run's length", _one_of(METHODS)),
    "loader": About("what decodes", _parts(LOADERS)),
    "memory_side": About("short side at most with which loader memory keeps images, in pixels", "8 or more"),
    "crop": About("what crops the views", _one_of(CROPS)),
    "workers": About("decoding threads of a rank", NUMBER_OF_THREADS),
    "threads": About("threads that compute, on a CPU", NUMBER_OF_THREADS),
    "prefetch": About("batches decoded in advance", f"1 {OF_BATCHES}"),
    "on_error": About("an image that does not decode: stop, or take the next", _one_of(ON_ERROR)),
    "micro_batches": About("equal parts in which a rank's batch is computed", FROM_ONE),
    "recomputes": About("recompute activations in the backward, chosen by memory", SWITCH),
    "deterministic": About("the same bits on every run on a GPU, too", SWITCH),
    "log_every": About("steps between rows of metrics.jsonl", FROM_ONE),
    "checkpoint_s": About("seconds between checkpoints", ABOVE),
    "knn_bank": About("images at most among which a score within the run looks for neighbours", FROM_ONE),
    "knn_at": About("shares of the run at which it is scored, too", "numbers between 0 and 1"),
    "quality_at": About("shares at which it is measured without labels, too", "numbers between 0 and 1"),
    "stop_on_collapse": About("end with status 3 when the embeddings collapse", SWITCH),
    "profile": About("write a trace of ten steps", SWITCH),
    "tensorboard": About("write TensorBoard events", SWITCH),
    "wandb": About("log to this project of Weights & Biases", "a name"),
}
RECIPE = {
    "name": About("what the run is called", "a name"),
    "crop_px": About("side of a training view in pixels", SIDE, "P section 3.3: 224"),
    "batch_size": About("images in a step, over all ranks", "2 or more", "P section 3.3: 4096"),
    "epochs": About("the length that the constants were chosen for", ABOVE, "P section 3.3: 1000"),
    "eval_px": About("side of an evaluation view in pixels", SIDE, "P appendix C.1: 224"),
    "eval_margin": About("side of its square by the image's short side", "above 0, to 1", "P appendix C.1: 224 / 256"),
    "target_statistics": About("what the target normalises by", _one_of(TARGET_STATISTICS), "P: batch"),
    "lagged_target": About("move the target in the launch of the loss, one step late", SWITCH),
    "recalibrate": About(
        "batches from which the running statistics are computed anew after training", f"0 {OF_BATCHES}"
    ),
}
ENCODER = {
    "arch": About("the network", _parts(ENCODERS), "P section 3.3: resnet50"),
    "width": About("multiplier of every layer's channels", f"{ABOVE}, to {WIDTH_MAX}", "P section 3.3: 1"),
    "stem": About("the first layers", "imagenet, cifar, cifar_stride2"),
    "channels": About("of the images, which are RGB or gray", " or ".join(map(str, CHANNELS)), "P: 3"),
    "frozen": About("parameters that stay as drawn, by what their names begin with", "names with spaces between"),
    "padding": About("of a ResNet's layers: as in PyTorch, or as in TensorFlow and JAX", _one_of(PADDINGS), "DM: same"),
}
HEAD = {
    "hidden": About("width of the hidden layers of projector and predictor", SIZE, "P section 3.3: 4096"),
    "out": About("dimensions of a projection", SIZE, "P section 3.3: 256"),
    "projector_depth": About("linear layers of the projector", "1 to 3", "P section 3.3: 2"),
    "predictor_depth": About("linear layers of the predictor; 0 is none", "0 to 3", "P section 3.3: 2"),
    "local_predictor": About("a predictor of their own for local views", SWITCH, "arXiv 2602.05845"),
}
VIEW = {
    "area": About("share of the image that a crop covers, least and most", "above 0, to 1", "P appendix B: 0.08, 1"),
    "ratio": About("width / height of a crop, least and most", ABOVE, "P appendix B: 3/4, 4/3"),
    "flip": About("probability of a horizontal flip", PROBABILITY, f"{VIEWS}: 0.5"),
    "jitter": About("probability of colour jitter", PROBABILITY, f"{VIEWS}: 0.8"),
    "brightness": About("most that jitter changes the brightness, either way", PROBABILITY, f"{VIEWS}: 0.4"),
    "contrast": About("most that it changes the contrast", PROBABILITY, f"{VIEWS}: 0.4"),
    "saturation": About("most that it changes the saturation", PROBABILITY, f"{VIEWS}: 0.2"),
    "hue": About("most that it turns the hue, in turns", PROBABILITY, f"{VIEWS}: 0.1"),
    "grayscale": About("probability of gray", PROBABILITY, f"{VIEWS}: 0.2"),
    "blur": About("probability of a Gaussian blur", PROBABILITY, f"{VIEWS}: 1 and 0.1"),
    "sigma": About("standard deviation of the blur in pixels, least and most", ABOVE, "P appendix B: 0.1, 2"),
    "solarize": About("probability of solarising", PROBABILITY, f"{VIEWS}: 0 and 0.2"),
    "local_px": About("side of a local view in pixels; left out, the view is global", SIDE),
}
OPTIM = {
    "base_lr": About("peak learning rate per 256 images of batch", FROM_ZERO, "P section 3.3: 0.2; DM by length"),
    "weight_decay": About("strength of weight decay", FROM_ZERO, "P section 3.3: 1.5e-6"),
    "tau_base": About("EMA rate of the target at the start", PROBABILITY, "P section 3.3: 0.996; DM by length"),
    "warmup_epochs": About("epochs in which the learning rate rises", FROM_ZERO, "P section 3.3: 10"),
    "momentum": About("momentum; beta 1 of AdamW", "0 to 1, without 1", "DM: 0.9"),
    "trust": About("trust coefficient of LARS", ABOVE, "DM: 1e-3"),
    "tau_rises": About("let the EMA rate rise to 1", SWITCH, "P section 3.2: true"),
    "optimizer": About("the optimiser", _parts(OPTIMIZERS), "P section 3.3: lars"),
    "predictor_lr_scale": About("multiplies the predictor's learning rate", f"{ABOVE}, to {LR_SCALE_MAX}"),
}
OBJECTIVE = {
    "loss": About("the loss", _parts(OBJECTIVES), "P eq. 2: byol"),
    "target": About("where the second view's projection comes from", _one_of(TARGETS), "P: ema"),
    "normalization": About("of the projections before they are compared", _one_of(NORMALIZATIONS), "P eq. 2: l2"),
    "beta": About("weight of the negatives; 0 is BYOL, 1 contrastive", FROM_ZERO, f"{NEGATIVES}: 0"),
    "temperature": About("temperature of the negatives", ABOVE, f"{NEGATIVES}: 0.1"),
    "queue": About("earlier projections that are negatives; 0 takes the batch", FROM_ZERO),
    "fade": About("share of the run over which beta goes to beta_end; 0 keeps it", PROBABILITY),
    "beta_end": About("weight of the negatives once they have faded", FROM_ZERO),
    "decoupled": About("an image's other view is none of its negatives", SWITCH, "arXiv 2110.06848"),
    "invariance": About("weight of the views' distance in loss vicreg", FROM_ZERO, f"{VICREG}: 25"),
    "variance": About("weight of what deviations lack to 1 in loss vicreg", FROM_ZERO, f"{VICREG}: 25"),
    "covariance": About("weight of covariances in loss vicreg", FROM_ZERO, f"{VICREG}: 1"),
    "similarity": About("weight of the views' agreement in loss coding-rate", FROM_ZERO, f"{EMP_SSL}: 200"),
    "distortion": About("squared distortion of the coding rate", ABOVE, f"{EMP_SSL}: 0.2"),
}
CROP_RAMP = {
    "sizes_px": About("sides of the smaller views at first, each for an equal share", "8 or more, below crop_px"),
    "until": About("progress at which views have full size", "above 0, below 1"),
}
PRESET = {
    "epochs": About("the length of a run", ABOVE, "DM: 40, 100, 300, 1000"),
    "base_lr": About("its base learning rate; between the lengths it is interpolated", FROM_ZERO, "DM"),
    "tau_base": About("its EMA rate at the start", PROBABILITY, "DM"),
}
TABLES = {
    "": RUN,
    "recipe": RECIPE,
    "recipe.encoder": ENCODER,
    "recipe.head": HEAD,
    "recipe.views": VIEW,
    "recipe.optim": OPTIM,
    "recipe.objective": OBJECTIVE,
    "recipe.crop_ramp": CROP_RAMP,
    "recipe.presets": PRESET,
}
SETTINGS = {f"{path}.{name}".lstrip("."): about for path, table in TABLES.items() for name, about in table.items()}
