"""A ResNet-50's step on 8 to 1024 GPUs, on paper: predictions, of which none was measured on more than one GPU.

`python benchmarks/scaling.py` prints the tables, --write puts them into docs/performance.md, --measure FILE times 1, 2
and 3 gloo ranks on this CPU, which the same model is held against. A step is the slowest rank's own work, then what
synchronised batch norm waits for, then what of the gradients' all-reduce the backward does not hide:

    own work    FIXED + max(images PER_IMAGE, LAUNCHES LEAST), times 1 + SPREAD N(0, 1) for the slowest of all ranks
    all-reduce  a tree's latency + bytes over a rate; of gradients, those of a ring
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import log2
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, from a checkout

import numpy as np
import torch

from benchmarks.document import DOCUMENT, put
from fastbyol.model.batchnorm import _PerView
from fastbyol.model.byol import BYOL, VIEWS
from fastbyol.recipe import Recipe
from fastbyol.recipes import named

BEGIN, END = "<!-- scaling: python benchmarks/scaling.py --write -->", "<!-- end of scaling -->"
MEASURED = Path(__file__).parent / "results" / "trainings" / "cpu_ranks.jsonl"
WITHIN = 0.25  # of the measured CPU-seconds of ranks; they vary by a tenth from run to run on a shared machine

# Measured on an H100, benchmarks/results/gpu.jsonl, commit 80c0cd0: a step of 512 images; FIXED are the profile's LARS,
# casts and idle gaps, which do not grow with the batch.
STEP_S, STEP_IMAGES = 176.23e-3, 512
FIXED_S = 2.2e-3
PER_IMAGE_S = (STEP_S - FIXED_S) / STEP_IMAGES
BACKWARD = 0.55  # of a step's own work, of the same profile; gradients may travel in it
# Assumed: the least time of a launch in a CUDA graph. Of launches traffic.py sees 864 in forward, loss and backward.
LEAST_S, LAUNCHES = 3e-6, 900
# Assumed: cards of one kind differ by a hundredth in speed. One card's own steps differ by 0.05 % (same row).
SPREAD, DRAWS = 0.01, 400
# Sources: NVIDIA's data sheet of the DGX H100 (NVLink 450 GB/s each way a GPU, eight NICs of 400 Gb/s a machine).
# Assumed: collectives reach four fifths.
PER_MACHINE = 8
NVLINK, NETWORK = 0.8 * 450e9, 0.8 * PER_MACHINE * 50e9  # bytes/s of a ring, in a machine and among machines
# Source: NCCL, src/graph/tuning.cc, tree with protocol LL: its start, a hop in a machine, and one between machines.
START_S, NVLINK_HOP_S, NETWORK_HOP_S, SLOWER = 4.4e-6, 0.52e-6, 5.0e-6, 1.8  # the last: NVLink's where a network is
SMALL = 80e9 / 3.8 / 2  # bytes/s of such a tree
BUCKET = 25 * 2**20  # bytes of gradients that DistributedDataParallel sends together
# Measured: CPU time of a decoded photograph of 500 px, benchmarks/results/loader.jsonl, native, 2 threads. Assumed: 14
# cores a GPU, as a DGX H100 has; 80 kB an image; a file system of 100 GB/s for all machines.
DECODE_S, CORES, IMAGE_BYTES, FILES = 0.93e-3, 14, 80e3, 100e9
# Source: paper, figure 3: top-1 with batches of 4096, 2048, 1024, 512, 256, 128 and 64.
SCORES = {4096: 72.5, 2048: 72.4, 1024: 72.2, 512: 72.2, 256: 71.8, 128: 69.6, 64: 59.7}
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
EPOCH, EPOCHS = 1_281_167, 1000
LEAST_SHARE = 4  # images a rank, below which nothing is computed


def shared_statistics(recipe: Recipe) -> list[int]:
    """List the bytes of the all-reduces of synchronised batch norm in one step: sums and counts, each way online."""
    with torch.device("meta"):
        model = BYOL(recipe.encoder, recipe.head, seed=0)
    online = [layer for layer in model.modules() if isinstance(layer, _PerView)]
    target = [] if model.target is None else [each for each in model.target.modules() if isinstance(each, _PerView)]
    forward = [4 * VIEWS * (2 * layer.num_features + 1) for layer in online]  # the target's are among them
    followed = {id(layer) for layer in target}
    return forward + [size for layer, size in zip(online, forward, strict=True) if id(layer) not in followed]


def gradient_bytes(recipe: Recipe) -> int:
    """Return the bytes of a step's gradients, float32."""
    with torch.device("meta"):
        model = BYOL(recipe.encoder, recipe.head, seed=0)
    return 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)


def latency_s(gpus: int) -> float:
    """Return the latency of a small all-reduce."""
    machines = max(gpus // PER_MACHINE, 1)
    hop = NVLINK_HOP_S * (SLOWER if machines > 1 else 1.0)
    return START_S + 2 * ((min(gpus, PER_MACHINE) - 1) * hop + log2(machines) * NETWORK_HOP_S)


@dataclass(frozen=True)
class Step:
    """The predicted parts of a step on so many GPUs, in seconds, and the images/s of all of them."""

    gpus: int
    batch: int
    work_s: float
    waiting_s: float
    statistics_s: float
    gradients_s: float

    @property
    def total_s(self) -> float:
        """The whole step."""
        return self.work_s + self.waiting_s + self.statistics_s + self.gradients_s

    @property
    def images_per_s(self) -> float:
        """The rate of all GPUs, which decoding may limit."""
        return min(self.batch / self.total_s, self.gpus * CORES / DECODE_S)

    @property
    def hours(self) -> float:
        """The time of all epochs; in the first one the file system may be slower, later ones come from memory."""
        first = EPOCH / min(self.images_per_s, FILES / IMAGE_BYTES)
        return (first + (EPOCHS - 1) * EPOCH / self.images_per_s) / 3600

    @property
    def efficiency(self) -> float:
        """The share of so many times one GPU's rate."""
        return self.images_per_s / (self.gpus * STEP_IMAGES / STEP_S)


def predict(gpus: int, batch: int, statistics: Sequence[int], gradients: int) -> Step:
    """Predict a step of `batch` images on all GPUs together."""
    images = batch / gpus
    work_s = FIXED_S + max(images * PER_IMAGE_S, LAUNCHES * LEAST_S)
    speeds = np.random.default_rng(0).normal(0.0, SPREAD, (DRAWS, gpus))
    waiting_s = work_s * float(speeds.max(1).mean())
    latency = latency_s(gpus)
    statistics_s = sum(latency + size / SMALL for size in statistics)
    rate = (NVLINK if gpus <= PER_MACHINE else NETWORK) * gpus / (2 * (gpus - 1))
    buckets = -(-gradients // BUCKET)
    sent_s = buckets * latency + gradients / rate
    last_s = latency + min(BUCKET, gradients) / rate  # after the backward
    return Step(gpus, batch, work_s, waiting_s, statistics_s, max(last_s, sent_s - BACKWARD * work_s))


def line(step: Step) -> str:
    """Format a prediction."""
    milliseconds = (step.work_s, step.waiting_s, step.statistics_s, step.gradients_s, step.total_s)
    cells = [f"{step.gpus}", f"{step.batch // step.gpus}", *(f"{1000 * s:.1f}" for s in milliseconds)]
    gigabytes = step.images_per_s * IMAGE_BYTES / 1e9
    cells += [f"{step.images_per_s:,.0f}", f"{step.efficiency:.0%}", f"{step.hours:.1f}", f"{gigabytes:.1f}"]
    return f"| {' | '.join(cells)} |"


def table(batches: dict[int, int]) -> str:
    """Format the predictions for the whole batch of each number of GPUs."""
    recipe = named("imagenet_rn50")
    statistics, gradients = shared_statistics(recipe), gradient_bytes(recipe)
    head = "| GPUs | images each | own work, ms | slowest, ms | batch norm, ms | gradients, ms | step, ms | images/s "
    head += "| of linear | 1000 epochs, hours | GB/s read |"
    rows = [line(predict(gpus, batch, statistics, gradients)) for gpus, batch in batches.items()]
    return "\n".join([head, "|---" * 11 + "|", *rows])


def check(rows: Sequence[dict[str, Any]]) -> str:
    """Format the ranks measured on a CPU beside the same sum: each rank's own work, and its all-reduces alone."""
    lines = ["| gloo ranks | images each | CPU-ms a step, measured | predicted | apart by |", "|---" * 5 + "|"]
    for row in rows:
        apart = row["predicted_ms"] / row["cpu_ms"] - 1
        cells = (str(row["ranks"]), str(row["images"]), f"{row['cpu_ms']:.0f}", f"{row['predicted_ms']:.0f}")
        lines.append(f"| {' | '.join(cells)} | {apart:+.0%} |")
    return "\n".join(lines)


def markdown() -> str:
    """Format both tables of predictions and the check."""
    largest = max(SCORES)
    same = {gpus: largest for gpus in GPUS if largest // gpus >= LEAST_SHARE}
    grown = {gpus: STEP_IMAGES * gpus for gpus in GPUS}
    return "\n\n".join(
        [
            f"Predicted, {largest} images a step, the largest batch that the paper scored:",
            table(same),
            f"Predicted, {STEP_IMAGES} images a GPU; above 8 GPUs a batch that the paper did not score:",
            table(grown),
            "Measured on a CPU with two cores, cifar10_tiny's step of 48 images; predicted is the same sum, of each "
            "rank's step timed in a process alone, and of its all-reduces:",
            check([json.loads(each) for each in MEASURED.read_text().splitlines()]),
        ]
    )


def main() -> None:
    """Print the tables, put them into docs/performance.md, or measure ranks."""
    parser = argparse.ArgumentParser(prog="scaling.py", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/performance.md")
    parser.add_argument("--measure", type=Path, metavar="FILE", help="time ranks on this CPU, into this .jsonl")
    args = parser.parse_args()
    if args.measure:
        from benchmarks import ranks  # noqa: PLC0415  # which takes processes of its own

        args.measure.write_text("".join(json.dumps(row) + "\n" for row in ranks.measure()))
    elif args.write:
        put(markdown(), DOCUMENT, BEGIN, END)
    else:
        print(markdown())


if __name__ == "__main__":
    main()
