"""The work and bytes of a BYOL step, and so how fast a GPU could be at best: predictions, not measurements.

`python benchmarks/roofline.py` prints the table; --write puts it into docs/performance.md. A part takes the longer of
its arithmetic at a card's rate and its bytes at the card's bandwidth; parts follow one another. Per image: two views,
each forward and backward through the online network and forward through the target. Heads, loss, views and LARS are
left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, from a checkout

import torch
from torch import Tensor, nn

from benchmarks.document import DOCUMENT, put
from fastbyol.config import EncoderConfig
from fastbyol.model.batchnorm import BatchNormAct2d, BatchNormAddReLU2d, joins
from fastbyol.model.resnet import BasicBlock, Bottleneck, ResNet

BATCH = 512  # images, over whose views a weight is read once
VIEWS = 2
WIDTH = 2  # bytes of a bf16
MASK = 1 / 16  # of a tensor's bytes: a bit an element
FOLDED = 64  # channels that kernels/stem.py makes of an image's 3, at half the side and MARGIN rows more
MARGIN = 3
INDEX = 8  # bytes of an index that torch's max-pool keeps an output element
BEGIN, END = "<!-- predictions: python benchmarks/roofline.py --write -->", "<!-- end of predictions -->"
NETWORKS = (
    ("resnet50", "imagenet", 224),
    ("resnet50", "imagenet", 192),
    ("resnet50", "imagenet", 160),
    ("resnet50", "imagenet", 128),
    ("resnet50", "imagenet", 96),
    ("resnet18", "imagenet", 224),
    ("resnet18", "cifar", 32),
)


class Card(NamedTuple):
    """A GPU's bytes/s of a large copy, read plus written, and bf16 FLOP/s of a large matrix product: assumed."""

    name: str
    bandwidth: float
    rate: float


CARDS = (Card("H100", 3.0e12, 790e12), Card("H200", 4.3e12, 790e12))  # one chip in two; its memory differs


@dataclass
class Unit:
    """A convolution and the batch norm after it, in bytes per image and view; a batch shares the weight's.

    is_joined: the convolution computes the batch norm's statistics.
    """

    read: float
    written: float
    weight: float
    flops: float
    is_stem: bool
    is_joined: bool
    has_relu: bool = True
    has_residual: bool = False


class Part(NamedTuple):
    """A piece of work: floating-point operations and bytes moved."""

    flops: float
    moved: float

    def seconds(self, card: Card) -> float:
        """Return a lower bound of the time on a card."""
        return max(self.flops / card.rate, self.moved / card.bandwidth)


@dataclass(frozen=True)
class Network:
    """The units of an encoder, and the bytes of its block inputs, of folded images and around its max-pool."""

    units: list[Unit]
    block_inputs: list[float]
    folded: float
    pool: tuple[float, float] | None


class Switches(NamedTuple):
    """What a step can do otherwise; the defaults are today's.

    joins: most 1x1 convolutions compute the statistics after them; pools: the stem's batch norm pools; folds_stem: its
    convolution takes folded images; recomputes: see Encoder.set_recompute; target: its batch norm takes the statistics
    of the batch ("batch") or "running" ones.
    """

    joins: bool = True
    pools: bool = True
    folds_stem: bool = True
    recomputes: bool = False
    target: str = "batch"


TODAY = Switches()


def trace(arch: str, stem: str, side: int) -> Network:
    """Run an encoder without numbers and note every convolution, batch norm and block input."""
    with torch.device("meta"):
        encoder = ResNet(EncoderConfig(arch, stem=stem), views=1)
    units: list[Unit] = []
    block_inputs: list[float] = []

    def per_image(x: Tensor) -> float:
        return x.numel() / len(x) * WIDTH

    def note(module: nn.Module, given: Sequence[Any], result: Any) -> None:
        if isinstance(module, nn.Conv2d):
            positions = result.numel() / len(result) / module.out_channels
            weight = module.weight.numel()
            is_stem = module is encoder.conv1
            share = weight * WIDTH / (BATCH * VIEWS)
            sizes = per_image(given[0]), per_image(result), share, 2 * weight * positions
            units.append(Unit(*sizes, is_stem, joins(module, given[0])))
        elif isinstance(module, BatchNormAddReLU2d):
            units[-1].has_residual = True
        elif isinstance(module, BatchNormAct2d):
            units[-1].has_relu = module.relu
        elif isinstance(module, BasicBlock | Bottleneck):
            block_inputs.append(per_image(given[0][0]))

    for module in encoder.modules():
        module.register_forward_hook(note)
    with torch.no_grad():
        encoder(torch.empty(2, 3, side, side, device="meta"))
    pool = (units[0].written, block_inputs[0]) if isinstance(encoder.maxpool, nn.MaxPool2d) else None
    folded = FOLDED * (side // 2 + MARGIN) * (side // 2) * WIDTH
    return Network(units, block_inputs, folded, pool)


def convolution(unit: Unit, role: str) -> Iterator[Part]:
    """Yield forward, or the gradients of the weight and, but for the stem, of the input."""
    moved = unit.read + unit.written + unit.weight
    for _ in range(2 - unit.is_stem if role == "backward" else 1):
        yield Part(unit.flops, moved)


def eager(network: Network, role: str) -> Iterator[Part]:
    """Yield the passes of plain torch: every operation reads and writes its tensors.

    role: of the "online" network's forward or its "backward", or of the "target".
    """
    is_backward = role == "backward"
    for unit in network.units:
        yield from convolution(unit, role)
        passes = (5 + 3 * unit.has_relu) if is_backward else (3 + 3 * unit.has_residual + 2 * unit.has_relu)
        yield Part(0, passes * unit.written)
    if is_backward:
        yield Part(0, 3 * sum(network.block_inputs))  # autograd adds the gradients of two consumers
    if network.pool is not None:  # with the index it keeps for the backward; both directions move the same
        read, written = network.pool
        yield Part(0, read + written * (1 + INDEX / WIDTH))


def fused(network: Network, role: str, switches: Switches = TODAY) -> Iterator[Part]:
    """Yield the passes of our kernels: statistics, then all else at once; backward sums, then the rest.

    role: as in eager.
    """
    for unit in network.units:
        if unit.is_stem and network.pool is not None:
            yield from _stem(network, role, switches)
        else:
            yield from convolution(unit, role)
            yield Part(0, normalization(unit, role, switches))
    if role == "backward" and network.pool is None:
        yield Part(0, 3 * network.block_inputs[0])  # the first block's input comes from no kernel that adds gradients


def normalization(unit: Unit, role: str, switches: Switches) -> float:
    """Count the bytes of kernels/batchnorm.py after a convolution; some inputs of convolutions are computed again."""
    if role == "backward":
        is_computed_again = switches.recomputes and unit.has_relu and not (unit.has_residual or unit.is_stem)
        return (5 + (2 + MASK) * unit.has_residual + 2 * is_computed_again) * unit.written
    masks = MASK if role == "online" else 0
    passes = 2 + (1 + masks) * unit.has_residual
    return (passes + _takes_statistics(unit, role, switches)) * unit.written


def _takes_statistics(unit: Unit, role: str, switches: Switches) -> bool:
    """Return whether a forward reads a convolution's output for its statistics alone."""
    return (role != "target" or switches.target == "batch") and not (unit.is_joined and switches.joins)


def _stem(network: Network, role: str, switches: Switches) -> Iterator[Part]:
    """Yield the convolution of an ImageNet stem, its batch norm and its pooling, which keeps a byte an element."""
    unit, is_backward = network.units[0], role == "backward"
    assert network.pool is not None
    read, written = network.pool
    places = written / WIDTH if role != "target" else 0.0
    yield from convolution(replace(unit, read=network.folded) if switches.folds_stem else unit, role)
    if switches.folds_stem and (not is_backward or switches.recomputes):
        yield Part(0, unit.read + network.folded)
    if not switches.pools:
        yield Part(0, normalization(unit, role, switches))
        yield Part(0, read + (1 + is_backward) * written + places)
    elif is_backward:
        yield Part(0, 3 * read + 4 * written + 2 * places)
    else:
        yield Part(0, (1 + _takes_statistics(unit, role, switches)) * read + written + places)


class Weights(NamedTuple):
    """How many parameters are trained, followed by a target, and, of each of the two, cast to bfloat16 in a step."""

    trained: int
    followed: int
    cast: int
    cast_followed: int


def kept(weights: Weights) -> float:
    """Count a step's bytes of its weights alone: LARS with EMA, casts of weights, of targets and of gradients.

    A cast reads float32 and writes bfloat16, or the reverse. The norms of LARS read two numbers, its sweep reads three
    and writes two, and reads and writes a target.
    """
    lars = 7 * 4 * weights.trained + 2 * 4 * weights.followed
    return lars + (4 + WIDTH) * (2 * weights.cast + weights.cast_followed)


class Prediction(NamedTuple):
    """Work, bytes and speed of one way of running a step, per image."""

    gflop: float
    mb: float
    images_per_s: float


def predict(network: Network, passes: Callable[[Network, str], Iterator[Part]], card: Card) -> Prediction:
    """Add up the online network's forward and backward and the target's forward, for both views."""
    parts = [part for role in ("online", "backward", "target") for part in passes(network, role)]
    flops, moved, seconds = (
        VIEWS * sum(values) for values in zip(*((*p, p.seconds(card)) for p in parts), strict=True)
    )
    return Prediction(flops / 1e9, moved / 1e6, 1 / seconds)


def markdown() -> str:
    """Format the predictions, eager beside fused, for each card."""
    rates = " | ".join(f"{card.name} images/s, eager | fused | times" for card in CARDS)
    lines = [f"| network | GFLOP/image | MB/image, eager | MB/image, fused | {rates} |"]
    lines.append("|---" * (4 + 3 * len(CARDS)) + "|")
    for arch, stem, side in NETWORKS:
        network = trace(arch, stem, side)
        cells = [f"{arch}, {stem} stem, {side} px"]
        for card in CARDS:
            plain, ours = (predict(network, passes, card) for passes in (eager, fused))
            if card is CARDS[0]:
                cells += [f"{plain.gflop:.1f}", f"{plain.mb:.0f}", f"{ours.mb:.0f}"]
            cells += [f"{plain.images_per_s:.0f}", f"{ours.images_per_s:.0f}"]
            cells.append(f"{ours.images_per_s / plain.images_per_s:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, or put it into docs/performance.md."""
    parser = argparse.ArgumentParser(prog="roofline.py", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    if parser.parse_args().write:
        put(markdown(), DOCUMENT, BEGIN, END)
    else:
        print(markdown())


if __name__ == "__main__":
    main()
