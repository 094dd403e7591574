"""Know multinomial logistic regression with an l2 penalty, by L-BFGS, for many strengths of the penalty.

    f(W, b) = sum over images of cross-entropy(x W + b, label) + l2 / 2 * |W|^2        (scikit-learn's, C = 1 / l2)

The problem is solved in the principal axes of the features, each scaled by about the root of the curvature along it:
the same minimum, since a rotation keeps |W| and the scaling is undone in the penalty, in far fewer steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from fastbyol.evaluate.features import Features
from fastbyol.threads import NO_TUNING, ThreadTuner

L2_PATH = tuple(float(10**e) for e in torch.linspace(-6, 5, 45, dtype=torch.float64).tolist())  # byol-spec, Evaluation
ROWS = 1 << 15  # of a gradient at a time: bounds the logits in memory
LOG_MIN = -45.0  # of a probability: far below rounding; products with denormals are many times slower


class Effort(NamedTuple):
    """Say when a fit ends: steps of L-BFGS at most, and largest entry of the scaled gradient, relative to W = 0."""

    steps: int
    tolerance: float


CHOOSING = Effort(100, 1e-6)  # enough to compare penalties
FINAL = Effort(1000, 1e-8)  # separable images want more: their minimum is far away


class Model(NamedTuple):
    """Hold a fitted classifier: weights [F, C], biases [C], float32."""

    weights: Tensor
    biases: Tensor

    def scores(self, values: Tensor) -> Tensor:
        """Map representations [N, F] to logits [N, C]."""
        return torch.addmm(self.biases, values, self.weights)


class Problem:
    """Hold centred features in their principal axes; fit a classifier for any penalty, from the last one's place."""

    def __init__(self, train: Features, *, classes: int, device: str = "cpu", threads: ThreadTuner = NO_TUNING) -> None:
        self._threads, values = threads, train.values.to(device)
        self._labels, self._classes = train.labels.to(device), classes
        self._mean = values.mean(0)
        centred = values - self._mean
        del values  # on a GPU a copy
        self._variance, self._axes = torch.linalg.eigh((centred.T @ centred).double())
        self._axes = self._axes.float()
        self._projected = centred @ self._axes  # [N, F]
        counts = torch.bincount(self._labels, minlength=classes).float()
        self._weights = torch.zeros(centred.shape[1], classes, device=device)  # in the axes, unscaled
        self._biases = (counts.clamp_min(0.5) / len(centred)).log()  # the optimum without weights

    def start_from(self, model: Model) -> None:
        """Let the next fit begin at a model of the same features and classes."""
        weights = model.weights.to(self._axes.device)
        self._weights = self._axes.T @ weights
        self._biases = model.biases.to(self._axes.device) + self._mean @ weights

    def fit(self, l2: float, *, effort: Effort = CHOOSING) -> Model:
        """Minimise f at this penalty, from the last fit's weights on."""
        share = 1 / self._classes
        curvature = self._variance.clamp_min(0) * share * (1 - share) + l2
        scale = curvature.rsqrt().float()[:, None]
        bias_scale = (len(self._projected) * share * (1 - share)) ** -0.5
        z = torch.cat([self._weights / scale, self._biases[None] / bias_scale]).requires_grad_()
        scales = torch.cat([scale, torch.full_like(scale[:1], bias_scale)])
        first, _ = self._gradient(torch.zeros_like(self._weights), self._biases, l2)
        limit = effort.tolerance * (first * scales).abs().max().item()
        solver = torch.optim.LBFGS(
            [z],
            max_iter=effort.steps,
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
        """Return the gradient by weights and, as the last row, by biases, [F + 1, C], and f in float64."""
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


def path(
    train: Features, l2s: Sequence[float], *, classes: int, device: str, label: str, threads: ThreadTuner = NO_TUNING
) -> Iterator[tuple[float, Model]]:
    """Fit every penalty from the largest down, each from the place of the one before: (l2, model)."""
    problem = Problem(train, classes=classes, device=device, threads=threads)
    bar = tqdm(sorted(l2s, reverse=True), desc=label, unit="l2", delay=2, leave=False, disable=None)
    for l2 in bar:
        yield l2, problem.fit(l2)


def loss(model: Model, data: Features, l2: float) -> float:
    """Return f in float64, for comparing solutions."""
    logits = data.values.double() @ model.weights.double() + model.biases.double()
    penalty = l2 / 2 * model.weights.double().square().sum()
    return (F.cross_entropy(logits, data.labels, reduction="sum") + penalty).item()
