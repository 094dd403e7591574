"""Groups of vectors by direction: spherical k-means (Dhillon and Modha 2001), the same for the same seed."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import trange

from fastbyol.embed.neighbours import unit_block
from fastbyol.embed.vectors import Vectors
from fastbyol.errors import require
from fastbyol.system.threads import NO_TUNING, ThreadTuner

ROWS = 8192  # read at a time
ROUNDS_MAX = 50
STARTERS = 20  # vectors a group, among which the first centres are drawn


@torch.inference_mode()
def cluster(
    vectors: Vectors, k: int, *, seed: int, device: str = "cpu", threads: ThreadTuner = NO_TUNING
) -> NDArray[np.int64]:
    """Divide the vectors into k groups; return the group of each, int64 [N], from 0, the largest, to k - 1."""
    count = len(vectors)
    check_number(k, count)
    centres = _first_centres(vectors, k, seed, device)
    groups = torch.full((count,), -1, dtype=torch.int64)
    for _ in trange(ROUNDS_MAX, desc="cluster", delay=2, leave=False, disable=None):
        sums, before, nearness = torch.zeros_like(centres), groups.clone(), torch.empty(count)
        for first in threads.units(range(0, count, ROWS), "cluster"):
            block = unit_block(vectors, first, first + ROWS, device)
            best = (block @ centres.T).max(1)
            groups[first : first + ROWS], nearness[first : first + ROWS] = best.indices.cpu(), best.values.cpu()
            is_of = torch.zeros(len(block), k, device=device).scatter_(1, best.indices[:, None], 1.0)
            sums += is_of.T @ block  # its order of sums is fixed
        if torch.equal(groups, before):
            break
        centres = _centres(vectors, sums, nearness, torch.bincount(groups, minlength=k), device)
    sizes = torch.bincount(groups, minlength=k)
    rank = torch.empty(k, dtype=torch.int64)
    rank[sizes.argsort(stable=True, descending=True)] = torch.arange(k)
    return rank[groups].numpy()


def check_number(k: int, images: int) -> None:
    """Raise ConfigError where there are fewer images than groups."""
    require(k <= images, f"--clusters is {k}, but there are {images} images; give at most as many")


def _first_centres(vectors: Vectors, k: int, seed: int, device: str) -> Tensor:
    """Draw k of the vectors, each with a probability that rises with its distance from those drawn before."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(vectors), generator=generator)[: STARTERS * k].sort().values
    pool = F.normalize(torch.from_numpy(vectors.take(chosen.numpy())).to(device).float(), dim=1)
    far = torch.ones(len(pool), dtype=torch.float64)
    drawn: list[int] = []
    is_left = torch.ones_like(far)
    for _ in range(k):
        weights = far * is_left if (far * is_left).sum() > 0 else is_left  # all that is left may be copies
        drawn.append(int(torch.multinomial(weights, 1, generator=generator)))
        is_left[drawn[-1]] = 0
        far = torch.minimum(far, (1 - pool @ pool[drawn[-1]]).clamp(min=0).double().cpu())
    return pool[drawn]


def _centres(vectors: Vectors, sums: Tensor, nearness: Tensor, sizes: Tensor, device: str) -> Tensor:
    """Return the mean directions; a group that is empty begins anew at a vector that is far from its centre."""
    centres = F.normalize(sums, dim=1)
    empty = (sizes == 0).nonzero().squeeze(1)
    far = nearness.argsort(stable=True)[: len(empty)].sort().values
    if len(empty):
        fresh = torch.from_numpy(vectors.take(far.numpy())).to(device).float()
        centres[empty.to(device)] = F.normalize(fresh, dim=1)
    return centres
