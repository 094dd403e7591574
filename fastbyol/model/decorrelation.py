"""Training losses without negatives and without a target: VICReg, and EMP-SSL's total coding rate."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from fastbyol.config import ObjectiveConfig
from fastbyol.kernels.reference import normalize_rows
from fastbyol.model.objective import at_least_float32, gather_rows

VARIANCE_EPS = 1e-4  # Bardes et al. 2022, section 4.2
HINGE = 1.0  # their target standard deviation of each dimension, section 4.1


def vicreg(
    z: Tensor, *, invariance: float, variance: float, covariance: float, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Compute VICReg's loss of projections z [2B, D], view-major, in float32 at least; B is at least 2.

    The weights are those of three terms: the squared distance of the two views, averaged over images and dimensions;
    what the standard deviation of a dimension lacks to 1, averaged over dimensions and views; the squares of the
    covariances between dimensions, divided by D and summed over views. With a group, the last two are of the rows of
    all its ranks, equally many on each. Gradients reach z, on other ranks too. Source: arXiv 2105.04906, with the
    scales of its authors' code.
    """
    first, second = at_least_float32(z).chunk(2)
    views = _views_of_all(at_least_float32(z), group)
    centred = views - views.mean(1, keepdim=True)
    covariances = centred.mT @ centred / (views.shape[1] - 1)
    variances = covariances.diagonal(dim1=1, dim2=2)
    lacking = (HINGE - (variances + VARIANCE_EPS).sqrt()).relu().mean()
    shared = (covariances - torch.diag_embed(variances)).square().sum() / z.shape[1]
    return invariance * (first - second).square().mean() + variance * lacking + covariance * shared


def coding_rate(z: Tensor, *, distortion: float, group: dist.ProcessGroup | None = None) -> Tensor:
    """Compute how many nats code projections z [2B, D], view-major, at unit length, up to this distortion (its square).

    ln det(I + D / (B * distortion) * Z^T Z) / 2 of a view's unit rows Z, averaged over views, in float32 at least: 0 or
    more, and the larger, the more directions the rows fill. With a group, of the rows of all its ranks. No host sync:
    inf and NaN give NaN. Source: arXiv 2304.03977, eq. 1.
    """
    views = _views_of_all(normalize_rows(at_least_float32(z)), group)
    count, dimensions = views.shape[1:]
    gram = views.mT @ views if dimensions <= count else views @ views.mT  # both have the same determinant
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    factor: Tensor = torch.linalg.cholesky_ex(identity + dimensions / (count * distortion) * gram).L
    return factor.diagonal(dim1=1, dim2=2).log().sum() / 2


def agreement(z: Tensor) -> Tensor:
    """Compute the mean cosine of projections z [2B, D], view-major, to the mean of an image's two unit projections."""
    views = normalize_rows(at_least_float32(z)).reshape(2, -1, z.shape[1])
    cosines: Tensor = cosine_similarity(views, views.mean(0, keepdim=True), dim=2)
    return cosines.mean()


def _views_of_all(z: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return rows [2B, D] by view, [2, N, D], with those of all ranks of a group."""
    if group is None:
        return z.reshape(2, -1, z.shape[1])
    by_rank = gather_rows(z, group).reshape(dist.get_world_size(group), 2, -1, z.shape[1])
    return by_rank.transpose(0, 1).flatten(1, 2)


class _OfProjections(nn.Module, ABC):
    """A loss of the projections of both views alone, of all ranks of `group` if that is set, in float32 at least."""

    def __init__(self, config: ObjectiveConfig, *, dimensions: int, seed: int) -> None:  # noqa: ARG002
        super().__init__()
        self.config = config
        self.group: dist.ProcessGroup | None = None

    def forward(self, q: Tensor, z: Tensor) -> Tensor:  # noqa: ARG002 - there is no target
        """Compute the loss, a scalar, of projections q [2B, D], view-major."""
        with torch.autocast(q.device.type, enabled=False):  # bfloat16 would round variances and cosines to hundredths
            return self._of(q)

    @abstractmethod
    def _of(self, q: Tensor) -> Tensor:
        """Compute the loss outside autocast."""


class VICReg(_OfProjections):
    """VICReg's loss, with the weights of an ObjectiveConfig."""

    def _of(self, q: Tensor) -> Tensor:
        weights = self.config
        return vicreg(
            q,
            invariance=weights.invariance,
            variance=weights.variance,
            covariance=weights.covariance,
            group=self.group,
        )


class CodingRate(_OfProjections):
    """similarity * (1 - agreement) - coding rate, as an ObjectiveConfig has it.

    It is EMP-SSL's loss with two views, plus `similarity`, so that views that agree add nothing.
    """

    is_capturable = False  # cuSOLVER factorises on a GPU, and no CUDA graph of that has been tried

    def _of(self, q: Tensor) -> Tensor:
        rate = coding_rate(q, distortion=self.config.distortion, group=self.group)
        return self.config.similarity * (1 - agreement(q)) - rate
