"""The bytes of a ResNet-50's step, counted in the code as it runs, beside those of roofline.py's formula.

`python benchmarks/byte_counts.py` prints a table of ways of running a step; --write puts it into docs/performance.md.
How bytes are counted: traffic.py. Views are left out of both, heads and loss of the formula; a step's weights alone,
with their casts and LARS, are a comparison of their own.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, from a checkout

import torch
from torch import Tensor, nn

from benchmarks import roofline, traffic
from benchmarks.cases import plain
from benchmarks.document import DOCUMENT, put
from benchmarks.roofline import BATCH, CARDS, TODAY, VIEWS, Switches
from fastbyol import optim
from fastbyol.config import EncoderConfig, HeadConfig
from fastbyol.kernels.max_pool import max_pool
from fastbyol.model.batchnorm import join_convolutions_
from fastbyol.model.byol import BYOL
from fastbyol.model.resnet import StemConv2d, Twins
from fastbyol.recipes import named
from fastbyol.train.memory import _make_fake

BEGIN, END = "<!-- byte counts: python benchmarks/byte_counts.py --write -->", "<!-- end of byte counts -->"
WITHIN = 0.03  # of each other
COMBINATIONS: dict[str, Switches | None] = {
    "plain torch": None,
    "today": TODAY,
    "statistics apart from 1x1 convolutions": Switches(joins=False),
    "batch norm apart from the stem's pooling": Switches(pools=False),
    "the stem's convolution of three channels": Switches(folds_stem=False),
    "all three apart": Switches(joins=False, pools=False, folds_stem=False),
    "activations recomputed": Switches(recomputes=True),
    "target on running statistics": Switches(target="running"),
}
CASTS_PX = 64  # of views whose size does not matter
OPTIM = named("imagenet_rn50").optim
CONVOLUTIONS = ("pointwise_kernel", "aten::convolution", "aten::convolution_backward")
NORMS = ("apply_kernel", "stats_kernel", "backward_sums_kernel", "backward_apply_kernel")


class _Convolution(nn.Module):
    """The stem's convolution as torch has it, on the same weight."""

    def __init__(self, ours: StemConv2d) -> None:
        super().__init__()
        self.weight = ours.weight

    def forward(self, images: Tensor) -> Tensor:
        return torch.conv2d(images, self.weight, stride=2, padding=3)


class _Pooling(nn.Module):
    """Batch norm, then our max-pool."""

    def forward(self, x: Tensor, norm: nn.Module) -> Twins:
        return max_pool(norm(x))


def model_for(arch: str, stem: str, switches: Switches) -> BYOL:
    """Build a model without numbers that runs a step as the switches say."""
    encoder = EncoderConfig(arch, stem=stem)
    with torch.device("meta"):
        model = BYOL(encoder, HeadConfig(), seed=0, target_statistics=switches.target)
    join_convolutions_(model, switches.joins)
    model.online.encoder.set_recompute(switches.recomputes)
    for branch in (model.online, model.target):
        if not switches.folds_stem:
            branch.encoder.conv1 = _Convolution(branch.encoder.conv1)
        if not switches.pools:
            branch.encoder.maxpool = _Pooling()
    return model


def count(arch: str, stem: str, side: int, switches: Switches | None) -> traffic.Counts:
    """Count the bytes of a step's forward, loss and backward; switches: None for plain torch."""
    model = model_for(arch, stem, switches or TODAY)
    with traffic.counted() as counts:
        for branch in (model.online, model.predictor, model.target):
            _make_fake(branch)
        run = plain.PerView(model) if switches is None else model
        shape = (VIEWS * BATCH, 3, side, side)
        views = torch.empty(shape, dtype=torch.bfloat16, memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            output = run(views)
        output.loss.backward()
    return counts


def count_weights(arch: str, stem: str) -> float:
    """Count the bytes of a step for its weights alone: their casts, and LARS, which takes addresses of real memory."""
    casts = count(arch, stem, CASTS_PX, TODAY)["aten::_to_copy"]
    model = model_for(arch, stem, TODAY).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    lars = optim.build(model, model.target_of(), OPTIM)
    with traffic.launches() as counts:
        lars.step()
    return casts + sum(counts.values())


def weights_of(arch: str, stem: str) -> roofline.Weights:
    """Count the parameters of a model; those of convolutions and linear layers are cast."""
    model = model_for(arch, stem, TODAY)

    def elements(parameters: Iterable[Tensor]) -> int:
        return sum(p.numel() for p in parameters)

    def cast(*branches: nn.Module) -> int:
        layers = (layer for branch in branches for layer in branch.modules())
        return sum(elements(x.parameters()) for x in layers if isinstance(x, nn.Conv2d | nn.Linear))

    trained = elements(p for p in model.parameters() if p.requires_grad)
    casts = cast(model.online, model.predictor), cast(model.target)
    return roofline.Weights(trained, elements(model.target_of()), *casts)


class Comparison(NamedTuple):
    """Bytes of a step, MB an image: by the formula, counted, and of what these are."""

    formula: float
    counted: float
    convolutions: float
    norms: float

    @property
    def difference(self) -> float:
        """By which share of it the formula is above the count."""
        return self.formula / self.counted - 1


def compare(arch: str, stem: str, side: int, switches: Switches | None) -> Comparison:
    """Compare the formula with the count for an encoder at a resolution."""
    passes = roofline.eager if switches is None else partial(roofline.fused, switches=switches)
    formula = roofline.predict(roofline.trace(arch, stem, side), passes, CARDS[0]).mb
    counts = count(arch, stem, side, switches)
    per_image = Counter({name: moved / BATCH / 1e6 for name, moved in counts.items()})
    convolutions, norms = (sum(per_image[name] for name in names) for names in (CONVOLUTIONS, NORMS))
    return Comparison(formula, sum(per_image.values()), convolutions, norms)


def line(name: str, found: Comparison) -> str:
    """Format the comparison of one way of running a step."""
    rest = found.counted - found.convolutions - found.norms
    parts = " | ".join(f"{mb:.0f}" for mb in (found.convolutions, found.norms, rest))
    return f"| {name} | {found.formula:.0f} | {found.counted:.0f} | {found.difference:+.1%} | {parts} |"


def weights_line(arch: str, stem: str) -> tuple[str, float]:
    """Format the bytes of a step's weights, and return by which share of them the formula is above the count."""
    formula, counted = roofline.kept(weights_of(arch, stem)), count_weights(arch, stem)
    difference = formula / counted - 1
    return f"| today | {formula / 1e6:.0f} | {counted / 1e6:.0f} | {difference:+.1%} |", difference


def markdown() -> str:
    """Format the comparison of every way of running a ResNet-50's step at 224 px, and of its weights alone."""
    head = "| a step | MB/image, formula | MB/image, counted | apart by | convolutions | batch norm | all else |"
    found = {name: compare("resnet50", "imagenet", 224, switches) for name, switches in COMBINATIONS.items()}
    lines = [head, "|---" * 7 + "|", *(line(name, each) for name, each in found.items()), ""]
    lines += ["| LARS and casts of weights | MB a step, formula | MB a step, counted | apart by |", "|---" * 4 + "|"]
    lines.append(weights_line("resnet50", "imagenet")[0])
    return "\n".join(lines)


def main() -> None:
    """Print the table, or put it into docs/performance.md."""
    parser = argparse.ArgumentParser(prog="byte_counts.py", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    if parser.parse_args().write:
        put(markdown(), DOCUMENT, BEGIN, END)
    else:
        print(markdown())


if __name__ == "__main__":
    main()
