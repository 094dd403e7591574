"""Laws of the online probe: it learns, tells what it saw, and moves nothing of BYOL."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastbyol import optim
from fastbyol.beton import UNLABELLED
from fastbyol.config import EncoderConfig, HeadConfig, OptimConfig
from fastbyol.model.byol import BYOL
from fastbyol.train import step
from fastbyol.train.probe import Probe
from tests.support import ranks
from tests.support.tolerances import FLOAT64_ATOL, FLOAT64_RTOL

OPTIM = OptimConfig(base_lr=0.8, weight_decay=1e-3, tau_base=0.9, warmup_epochs=0)
FEATURES, CLASSES = 6, 3


def probe_of(optimizer: str = "lars") -> Probe:
    return Probe(FEATURES, CLASSES, OPTIM, seed=0, device="cpu", optimizer=optimizer)


def batch(number: int, *, images: int = 12) -> tuple[Tensor, Tensor]:
    """Draw representations that show their class."""
    generator = torch.Generator().manual_seed(number)
    labels = torch.randint(CLASSES, (images,), generator=generator)
    return torch.randn(images, FEATURES, generator=generator) + 3 * F.one_hot(labels, FEATURES), labels


def test_a_step_is_lars_on_the_cross_entropy() -> None:
    probe = probe_of()
    naive = copy.deepcopy(probe.classifier)
    lars = optim.build(naive, {}, OPTIM)
    lars.set_rates(lr=0.5, tau=1.0)
    y, labels = batch(0)
    F.cross_entropy(naive(y), labels).backward()
    lars.step()
    probe.step(y, labels, lr=0.5)
    assert torch.equal(probe.classifier.weight, naive.weight)
    assert torch.equal(probe.classifier.bias, naive.bias)


def test_images_without_a_label_are_not_learnt_from() -> None:
    probe, whole = probe_of(), probe_of()
    y, labels = batch(0)
    labels[::3] = UNLABELLED
    known = labels != UNLABELLED
    probe.step(y, labels, lr=0.5)
    whole.step(y[known], labels[known], lr=0.5)
    torch.testing.assert_close(probe.classifier.weight, whole.classifier.weight)
    torch.testing.assert_close(probe.take_sums(), whole.take_sums())
    probe.step(y, torch.full_like(labels, UNLABELLED), lr=0.5)
    assert probe.classifier.weight.isfinite().all()
    assert math.isnan(probe.metrics(*probe.take_sums().tolist()).top1)


def test_a_reading_is_of_all_images_since_the_last_before_they_were_learnt() -> None:
    probe = probe_of()
    first = copy.deepcopy(probe.classifier)
    for images in (12, 4):
        probe.step(*batch(0, images=images), lr=0.0)
    y, labels = (torch.cat(parts) for parts in zip(batch(0), batch(0, images=4), strict=True))
    reading = probe.metrics(*probe.take_sums().tolist())
    assert reading.loss == pytest.approx(F.cross_entropy(first(y), labels).item(), rel=1e-5)
    assert reading.top1 == pytest.approx(100 * (first(y).argmax(1) == labels).double().mean().item())
    assert math.isnan(probe.metrics(*probe.take_sums().tolist()).loss)


@pytest.mark.parametrize(("optimizer", "lr"), [("lars", 20.0), ("muon", 2.0)])
def test_it_learns_classes_that_can_be_seen(optimizer: str, lr: float) -> None:
    probe = probe_of(optimizer)
    for number in range(200):
        probe.step(*batch(number), lr=lr)
        if number == 180:
            probe.take_sums()
    # chance is 33; at this rate LARS swings, and rounding decides how far
    assert probe.metrics(*probe.take_sums().tolist()).top1 > 75


def test_it_continues_where_a_checkpoint_left_it() -> None:
    whole, again = probe_of(), Probe(FEATURES, CLASSES, OPTIM, seed=9, device="cpu")
    whole.step(*batch(0), lr=0.5)
    again.load_state_dict(copy.deepcopy(whole.state_dict()))
    for probe in (whole, again):
        probe.step(*batch(1), lr=0.5)
    assert torch.equal(whole.classifier.weight, again.classifier.weight)
    assert torch.equal(whole.take_sums(), again.take_sums())


def test_byol_shows_the_first_views_representations_and_feels_no_probe() -> None:
    engines = []
    for _ in range(2):
        model = BYOL(EncoderConfig("resnet8", width=1 / 16, stem="cifar"), HeadConfig(hidden=16, out=8), seed=1)
        engines.append(step.Eager(model, optim.build(model, model.target_of(), OPTIM)))
    probe = Probe(engines[0].model.online.encoder.features, CLASSES, OPTIM, seed=0, device="cpu")
    for number in range(2):
        views = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(number))
        expected = copy.deepcopy(engines[0].model.online.encoder)(views)[:6]
        outputs = [engine(views, lr=0.5, tau=0.9) for engine in engines]
        assert torch.equal(outputs[0].representations, expected)
        assert not outputs[0].representations.requires_grad
        probe.step(outputs[0].representations, torch.arange(6) % CLASSES, lr=0.5)
    with_probe, without = (engine.model.state_dict() for engine in engines)
    assert all(torch.equal(with_probe[name], value) for name, value in without.items())


def partly_labelled() -> tuple[Tensor, Tensor]:
    """Draw a batch of whose first half few images have a label."""
    y, labels = batch(0)
    labels[1:6] = UNLABELLED
    return y, labels


def rank_main(rank: int, folder: Path) -> dict[str, Tensor]:  # noqa: ARG001
    """Learn from this rank's half of a batch."""
    probe = probe_of()
    probe.classifier.double()
    probe.group = dist.group.WORLD
    y, labels = partly_labelled()
    probe.step(y.double().chunk(2)[rank], labels.chunk(2)[rank], lr=0.5)
    return dict(probe.classifier.state_dict())


def test_ranks_hold_the_classifier_of_the_joined_batch(tmp_path: Path) -> None:
    got = ranks.run(rank_main, tmp_path, ranks=2)
    probe = probe_of()
    probe.classifier.double()
    y, labels = partly_labelled()
    probe.step(y.double(), labels, lr=0.5)
    for name, value in probe.classifier.state_dict().items():
        assert torch.equal(got[0][name], got[1][name])
        torch.testing.assert_close(got[0][name], value, rtol=FLOAT64_RTOL, atol=FLOAT64_ATOL)
