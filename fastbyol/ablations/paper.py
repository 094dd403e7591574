"""The paper's ablation tables: cells that change a base recipe, with the paper's scores.

Scores are linear top-1 on ImageNet of ResNet-50 after 300 epochs. Source: arXiv 2006.07733v3, section 5, appendix F.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastbyol.config import Recipe

BASELINE = 72.5
BASE_LR, BASE_WEIGHT_DECAY, BASE_OUT = (
    0.3,
    1e-6,
    256,
)  # of the paper's ablations; tables scale them to their base recipe


@dataclass(frozen=True)
class Cell:
    """One cell: its change to the base recipe ("" for none) and the paper's score, None if the paper has none.

    `flags` of fastbyol-train set what is not part of a recipe.
    """

    name: str
    change: str
    paper: float | None = None
    flags: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """The name of the cell's folder."""
        return " ".join([self.change or "baseline", *self.flags])


@dataclass(frozen=True)
class Table:
    """A table: its title, its place in the paper and its cells."""

    title: str
    source: str
    cells: Sequence[Cell]


def target(_: Recipe) -> Table:
    """Vary the target network."""
    cells = [
        Cell("constant random network (τ = 1)", "target=constant", 18.8),
        Cell("moving average, τ 0.999", "tau_base=0.999", 69.8),
        Cell("moving average, τ 0.99", "tau_base=0.99", BASELINE),
        Cell("moving average, τ 0.9", "tau_base=0.9", 68.4),
        Cell("stop-gradient of online (τ = 0)", "target=stop-gradient", 0.3),
        Cell("moving average, τ of the base recipe", ""),
    ]
    return Table("Target modes", "table 5a", cells)


def negatives(_: Recipe) -> Table:
    """Vary predictor, target and the weight of negatives; without a target the gradient flows into both projections.

    The paper prints "predictor, stop-gradient, β 1" twice, as 70.2 and 70.1; this cell is left out. It also prints
    "predictor, stop-gradient, β 0" twice: 5.5 here, 0.3 in table 5a. "Predictor, β 1" is 69.1 in 5b and 69.0 in 19.
    """
    no_predictor = "predictor_depth=0"
    cells = [
        Cell("predictor, target, β 0 (BYOL)", "", BASELINE),
        Cell("predictor, target, β 1", "beta=1", 70.9),
        Cell("target, β 1", f"{no_predictor}+beta=1", 70.7),
        Cell("β 1 (SimCLR)", f"{no_predictor}+target=online+beta=1", 69.4),
        Cell("stop-gradient, β 1", f"{no_predictor}+target=stop-gradient+beta=1", 69.2),
        Cell("predictor, β 1", "target=online+beta=1", 69.1),
        Cell("predictor, stop-gradient, β 0", "target=stop-gradient", 5.5),
        Cell("predictor, β 0", "target=online", 0.3),
        Cell("target, β 0", no_predictor, 0.2),
        Cell("stop-gradient, β 0", f"{no_predictor}+target=stop-gradient", 0.1),
        Cell("β 0", f"{no_predictor}+target=online", 0.1),
    ]
    return Table("From BYOL to SimCLR", "tables 5b and 19", cells)


def temperature(_: Recipe) -> Table:
    """Vary the temperature of the negatives, with predictor and target."""
    scores = {
        0.1: (72.2, 72.4, 72.7, 72.6, 72.5, 72.5),
        0.5: (70.9, 72.0, 72.7, 72.7, 72.6, 72.5),
        1.0: (53.9, 70.9, 72.7, 72.7, 72.6, 72.6),
    }
    cells = [Cell("β 0 (BYOL)", "", BASELINE)]
    for beta, row in scores.items():
        for alpha, score in zip((0.01, 0.1, 0.3, 1, 3, 10), row, strict=True):
            cells.append(Cell(f"β {beta:g}, temperature {alpha:g}", f"beta={beta:g}+temperature={alpha:g}", score))
    return Table("Negatives and temperature", "table 18", cells)


def batch(base: Recipe) -> Table:
    """Split the batch into micro-batches whose gradients are averaged, so that only batch norm sees smaller batches.

    Splits that would leave batch norm fewer than 2 images of the base recipe's batch are left out.
    """
    scores = {4096: BASELINE, 2048: 72.4, 1024: 72.2, 512: 72.2, 256: 71.8, 128: 69.6, 64: 59.7}
    parts = {size: max(scores) // size for size in scores}
    cells = [
        Cell(f"1/{parts[size]} of the batch", "", score, (f"--micro-batches={parts[size]}",) * (parts[size] > 1))
        for size, score in scores.items()
        if base.batch_size >= 2 * parts[size]
    ]
    return Table("Batch size by accumulation", "table 16", cells)


def augmentation(_: Recipe) -> Table:
    """Remove transformations from the views."""
    rows = (
        ("no flip", "no_flip", 71.9),
        ("no blur", "no_blur", 71.2),
        ("no colour (jitter, gray)", "no_color", 63.4),
        ("no jitter", "no_jitter", 71.8),
        ("no gray", "no_grayscale", 70.3),
        ("no blur in T'", "no_second_blur", 72.4),
        ("no solarization", "no_solarize", 72.3),
        ("no blur in T', no solarization", "no_second_blur_or_solarize", 72.2),
        ("blur 0.5 and solarization 0.2 in both", "symmetric", 72.5),
        ("crop", "crop", 59.4),
        ("crop, flip", "crop_flip", 60.1),
        ("crop, colour", "crop_color", 70.7),
        ("crop, blur", "crop_blur", 61.1),
    )
    changes = [Cell(name, f"views={views}", score) for name, views, score in rows]
    return Table("Image transformations", "table 17", [Cell("all", "", BASELINE), *changes])


def depth(_: Recipe) -> Table:
    """Vary the depths of projector and predictor."""
    scores = {1: (61.9, 65.0, 65.7), 2: (71.5, 72.5, 71.4), 3: (71.4, 72.1, 72.1)}
    cells = [
        Cell(f"projector {g}, predictor {q}", f"projector_depth={g}+predictor_depth={q}", row[q - 1])
        for g, row in scores.items()
        for q in (1, 2, 3)
    ]
    return Table("Projector and predictor depth", "table 14a", cells)


def projection(base: Recipe) -> Table:
    """Vary the projection size, in proportion to the base recipe's."""
    scores = {16: 69.9, 32: 71.3, 64: 72.2, 128: 72.5, 256: 72.5, 512: 72.6}
    cells = [Cell(f"{out}", f"out={max(base.head.out * out // BASE_OUT, 1)}", score) for out, score in scores.items()]
    return Table("Projection size", "table 14b", cells)


def learning_rate(base: Recipe) -> Table:
    """Vary the base learning rate, in proportion to the base recipe's."""
    scores = {0.01: 34.8, 0.1: 65.0, 0.2: 71.7, 0.3: 72.5, 0.4: 72.3, 0.5: 71.5, 1.0: 69.4}
    scale = base.optim.base_lr / BASE_LR
    return Table(
        "Learning rate",
        "table 15a",
        [Cell(f"{lr:g}", f"base_lr={lr * scale:.6g}", score) for lr, score in scores.items()],
    )


def weight_decay(base: Recipe) -> Table:
    """Vary the weight decay, in proportion to the base recipe's; without it the paper's runs diverge."""
    scores = {1e-7: 72.1, 5e-7: 72.6, 1e-6: 72.5, 5e-6: 71.0, 1e-5: 69.6, 0.0: None}
    scale = base.optim.weight_decay / BASE_WEIGHT_DECAY
    return Table(
        "Weight decay",
        "table 15b",
        [Cell(f"{decay:g}", f"weight_decay={decay * scale:.6g}", score) for decay, score in scores.items()],
    )


def normalization(_: Recipe) -> Table:
    """Vary the normalisation of the projections."""
    scores = {"l2": BASELINE, "layernorm": 72.5, "none": 67.4, "batchnorm": 65.3}
    cells = [Cell(name, f"normalization={name}", score) for name, score in scores.items()]
    return Table("Normalisation in the loss", "table 20", cells)


TABLES: dict[str, Callable[[Recipe], Table]] = {
    table.__name__: table
    for table in (
        target,
        negatives,
        temperature,
        batch,
        augmentation,
        depth,
        projection,
        learning_rate,
        weight_decay,
        normalization,
    )
}
