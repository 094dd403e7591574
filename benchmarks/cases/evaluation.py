"""The timed evaluations: neighbours, logistic regression over 45 penalties, a sweep of linear heads.

Neighbours and regression run on drawn representations in clusters, the sweep on the demo set. Rival of the first two is
scikit-learn; of the sweep, the same training with one learning rate, whose time five are to exceed by less than half.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases.compare import WrongResult
from benchmarks.harness import Absent, Case, Ready
from fastbyol.beton import Reader
from fastbyol.evaluate import knn, linear, linear_transfer, logistic
from fastbyol.evaluate.features import Features, evenly_spaced, represent
from fastbyol.evaluate.images import InputSettings
from fastbyol.model.resnet import build
from fastbyol.recipes import named

FEATURES, CLASSES = 512, 10
BANK, QUERIES = 50_000, 10_000
KS, TEMPERATURES = (10, 20, 200), (0.07, 0.1)
LEARNED, SCORED = 10_000, 5000
POINTS = 0.2  # of top-1 that logistic regression may be off
CHECKED = 500  # queries
GIB_MAX = 2
SPREAD = 3.0  # of a cluster, of the distance of their means: a tenth or so of the images lies nearer to another


def cases(device: str) -> Iterator[Case]:
    """Time what `device` does; scikit-learn runs on the CPU."""
    shape = f"{BANK} x {QUERIES} x {FEATURES}"
    yield Case("knn", f"{shape}, {len(KS)} k, {len(TEMPERATURES)} temperatures", "fastbyol", partial(_knn, device))
    yield Case("knn", f"{shape}, {len(KS)} k, {len(TEMPERATURES)} temperatures", "scikit-learn, brute", _knn_sklearn)
    shape = f"{LEARNED} x {FEATURES}, {CLASSES} classes"
    path = f"{shape}, {len(logistic.L2_PATH)} penalties and a refit"
    yield Case("logistic", path, "fastbyol", partial(_path, device))
    yield Case("logistic", f"{shape}, the chosen penalty", "scikit-learn, newton-cg", partial(_newton, device))
    for name, run in (("crop and flip, 1 epoch", _augmented), ("cached, 80 epochs", _cached)):
        for base_lrs in (linear.BASE_LRS, linear.BASE_LRS[:1]):
            rates = f"{len(base_lrs)} learning rate{'s' * (len(base_lrs) > 1)}"
            yield Case("linear", f"demo set, its ResNet-8, {name}", rates, partial(run, device, base_lrs))


@cache
def _clusters(count: int, seed: int) -> Features:
    """Draw representations about ten means, none of which is negative, as after a ReLU."""
    random = torch.Generator().manual_seed(seed)
    means = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(0))
    scales = torch.logspace(0, -2, FEATURES)  # directions matter unequally, as those of a network do
    labels = torch.randint(CLASSES, (count,), generator=random)
    return Features(((means[labels] + SPREAD * torch.randn(count, FEATURES, generator=random)) * scales).relu(), labels)


def _knn(device: str) -> Ready:
    bank, queries = _clusters(BANK, 1), _clusters(QUERIES, 2)

    def check() -> None:
        before_gib = _peak_gib(reset=True)
        knn.sweep(bank, queries, KS, TEMPERATURES, device=device)
        if _peak_gib() - before_gib > GIB_MAX:
            raise WrongResult(f"{_peak_gib() - before_gib:.1f} GiB were taken, more than {GIB_MAX}")
        _, indices = knn.nearest(bank.values, queries.values[:CHECKED], max(KS), device=device)
        double = (torch.nn.functional.normalize(x.double(), dim=1) for x in (queries.values[:CHECKED], bank.values))
        _agree_on_neighbours(indices, *double)

    return Ready(lambda: knn.sweep(bank, queries, KS, TEMPERATURES, device=device), check)


def _agree_on_neighbours(indices: Tensor, queries: Tensor, bank: Tensor) -> None:
    """Raise WrongResult unless the neighbours are as near as the nearest of float64."""
    similarities = queries @ bank.T
    missed = similarities.topk(indices.shape[1]).values - similarities.gather(1, indices)
    if missed.abs().max() > 1e-5:  # float32 rounds a cosine by less
        raise WrongResult(f"a neighbour is {missed.abs().max():.1e} further than the nearest")


def _peak_gib(*, reset: bool = False) -> float:
    """Return the peak memory of this process since the last reset, in GiB."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20  # KiB


def _knn_sklearn() -> Ready:
    sklearn = _sklearn("neighbors")
    bank, queries = (x.values.numpy() for x in (_clusters(BANK, 1), _clusters(QUERIES, 2)))

    def search() -> None:
        found = sklearn.NearestNeighbors(n_neighbors=max(KS), metric="cosine", algorithm="brute")
        found.fit(bank).kneighbors(queries)

    return Ready(search)


def _sklearn(module: str) -> Any:
    try:
        return __import__(f"sklearn.{module}", fromlist=["_"])
    except ImportError as error:
        raise Absent(f"scikit-learn is not installed ({error})") from error


@cache
def _chosen(device: str) -> dict[str, Any]:
    return linear_transfer.score(_clusters(LEARNED, 3), _clusters(SCORED, 4), device=device)


def _path(device: str) -> Ready:
    def check() -> None:
        found = _chosen(device)
        try:
            _sklearn("linear_model")
        except Absent:
            return  # its tests hold it to scikit-learn
        wanted = 100 * _optimum(found["l2"]).score(*_arrays(_clusters(SCORED, 4)))
        if abs(found["top1"] - wanted) > POINTS:
            raise WrongResult(f"top-1 {found['top1']:.2f}, scikit-learn's optimum {wanted:.2f}")

    return Ready(lambda: linear_transfer.score(_clusters(LEARNED, 3), _clusters(SCORED, 4), device=device), check)


def _optimum(l2: float) -> Any:
    model = _sklearn("linear_model").LogisticRegression(C=1 / l2, solver="newton-cg", tol=1e-6, max_iter=1000)
    return model.fit(*_arrays(_clusters(LEARNED, 3)))


def _arrays(features: Features) -> tuple[Any, Any]:
    return features.values.double().numpy(), features.labels.numpy()


def _newton(device: str) -> Ready:
    return Ready(partial(_optimum, _chosen(device)["l2"]))


@cache
def _demo_set() -> tuple[tempfile.TemporaryDirectory[str], Reader, Reader]:
    try:
        from fastbyol.data_prep import demo  # noqa: PLC0415  # its codecs may be missing beside a bare torch
    except ImportError as error:
        raise Absent(f"the codecs of fastbyol are not installed ({error})") from error
    folder = tempfile.TemporaryDirectory()
    train, val = demo.write(Path(folder.name))
    return folder, Reader(train), Reader(val)


def _augmented(device: str, base_lrs: tuple[float, ...]) -> Ready:
    _, train, val = _demo_set()
    encoder = build(named("demo").encoder, seed=0).to(device)
    inputs = InputSettings(32, 1.0, device=device)
    return Ready(lambda: linear.score_augmented(encoder, (train, val), inputs, epochs=1, base_lrs=base_lrs))


def _cached(device: str, base_lrs: tuple[float, ...]) -> Ready:
    """Represent every image once, and train 80 epochs of heads on that, as fastbyol-eval linear --cached does."""
    _, train, val = _demo_set()
    encoder = build(named("demo").encoder, seed=0).to(device)
    inputs = InputSettings(32, 1.0, device=device)

    def run() -> None:
        features = (represent(encoder, reader, evenly_spaced(len(reader), None), inputs) for reader in (train, val))
        linear.score(*features, base_lrs=base_lrs, device=device)

    return Ready(run)
