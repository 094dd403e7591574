"""Multinomial logistic regression with an l2 penalty, solved by L-BFGS for many strengths of the penalty.

    f(W, b) = sum over images of cross-entropy(x W + b, label) + l2 / 2 * |W|^2        (scikit-learn's, C = 1 / l2)

The problem is solved in the principal axes of the features, each scaled by about the root of the curvature along it.
The minimum is the same, because a rotation preserves |W| and the penalty undoes the scaling; far fewer steps are
needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbyol.errors import require
from fastbyol.evaluate.features import Features
from fastbyol.system.progress import Progress
from fastbyol.system.threads import NO_TUNING, ThreadTuner

L2_PATH = tuple(
    float(10**e) for e in torch.linspace(-6, 5, 45, dtype=torch.float64).tolist()
)  # 45 values, 1e-6 to 1e5: paper, appendix D
ROWS = 1 << 15  # per part of a gradient: bounds the memory of the logits
LOG_MIN = -45.0  # least log-probability: far below rounding; products with denormals are many times slower


class StopCriterion(NamedTuple):
    """When a fit ends: the number of L-BFGS steps, or the largest scaled gradient entry relative to that at W = 0."""

    steps: int
    tolerance: float


CHOOSING = StopCriterion(100, 1e-6)  # enough to compare penalties
FINAL = StopCriterion(1000, 1e-8)  # separable images need more steps: their minimum is far away


class Model(NamedTuple):
    """A fitted classifier: weights [F, C] and biases [C], float32."""

    weights: Tensor
    biases: Tensor

    def scores(self, values: Tensor) -> Tensor:
        """Map representations [N, F] to logits [N, C]."""
        return torch.addmm(self.biases, values, self.weights)


class Problem:
    """Centred features in their principal axes; each fit for a penalty starts from the solution before it."""

    def __init__(self, train: Features, *, classes: int, device: str = "cpu", threads: ThreadTuner = NO_TUNING) -> None:
        require(classes > 1, "logistic regression needs images of at least 2 classes; give more, or another protocol")
        self._threads, values = threads, train.values.to(device)
        self._labels, self._classes = train.labels.to(device), classes
        self._mean = values.mean(0)
        centred = values - self._mean
        del values  # a copy if on a GPU
        self._variance, self._axes = torch.linalg.eigh((centred.T @ centred).double())
        self._axes = self._axes.float()
        self._projected = centred @ self._axes  # [N, F]
        counts = torch.bincount(self._labels, minlength=classes).float()
        self._weights = torch.zeros(centred.shape[1], classes, device=device)  # in the principal axes, unscaled
        self._biases = (counts.clamp_min(0.5) / len(centred)).log()  # the optimum for weights of 0

    def start_from(self, model: Model) -> None:
        """Start the next fit from a model of the same features and classes."""
        weights = model.weights.to(self._axes.device)
        self._weights = self._axes.T @ weights
        self._biases = model.biases.to(self._axes.device) + self._mean @ weights

    def fit(self, l2: float, *, stop: StopCriterion = CHOOSING) -> Model:
        """Minimise f at this penalty, starting from the weights of the last fit."""
        class_share = 1 / self._classes
        curvature = self._variance.clamp_min(0) * class_share * (1 - class_share) + l2
        scale = curvature.rsqrt().float()[:, None]
        bias_scale = (len(self._projected) * class_share * (1 - class_share)) ** -0.5
        z = torch.cat([self._weights / scale, self._biases[None] / bias_scale]).requires_grad_()
        scales = torch.cat([scale, torch.full_like(scale[:1], bias_scale)])
        first, _ = self._gradient(torch.zeros_like(self._weights), self._biases, l2)
        limit = stop.tolerance * (first * scales).abs().max().item()
        solver = torch.optim.LBFGS(
            [z],
            max_iter=stop.steps,
            history_size=20,
            tolerance_grad=limit,
            tolerance_change=1e-9,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            with torch.no_grad(), self._threads.unit("logistic"):
                gradient, value = self._gradient(z[:-1] * scale, z[-1] * bias_scale, l2)
                z.grad = gradient * scales
            return value

        solver.step(closure)  # type: ignore[no-untyped-call]
        solved = z.detach()
        self._weights, self._biases = solved[:-1] * scale, solved[-1] * bias_scale
        weights = self._axes @ self._weights
        return Model(weights.cpu(), (self._biases - self._mean @ weights).cpu())

    def _gradient(self, weights: Tensor, biases: Tensor, l2: float) -> tuple[Tensor, Tensor]:
        """Return the gradient [F + 1, C], whose last row is that of the biases, and f in float64."""
        gradient = torch.cat([l2 * weights, torch.zeros_like(biases)[None]])
        value = l2 / 2 * weights.double().square().sum()
        for x, y in zip(torch.split(self._projected, ROWS), torch.split(self._labels, ROWS), strict=True):
            log_p = torch.addmm(biases, x, weights).log_softmax(1)
            value -= log_p.gather(1, y[:, None]).double().sum()
            error = log_p.clamp_min_(LOG_MIN).exp_()
            error[torch.arange(len(y), device=y.device), y] -= 1
            gradient[:-1].addmm_(x.T, error)
            gradient[-1] += error.sum(0)
        return gradient, value


def fit_path(
    train: Features, l2s: Sequence[float], *, classes: int, device: str, label: str, threads: ThreadTuner = NO_TUNING
) -> Iterator[tuple[float, Model]]:
    """Yield (l2, model) for every penalty from the largest down, each fit starting from the solution before it."""
    problem = Problem(train, classes=classes, device=device, threads=threads)
    bar = Progress(sorted(l2s, reverse=True), total=len(l2s), desc=label, unit="l2")
    for l2 in bar:
        yield l2, problem.fit(l2)


def loss(model: Model, data: Features, l2: float) -> float:
    """Return f in float64, to compare solutions."""
    logits = data.values.double() @ model.weights.double() + model.biases.double()
    penalty = l2 / 2 * model.weights.double().square().sum()
    return (F.cross_entropy(logits, data.labels, reduction="sum") + penalty).item()
