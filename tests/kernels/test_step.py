"""Laws of the whole step through the kernels: from packed bytes to the moved target it is the reference's step."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from fastbyol import optim, views
from fastbyol.config import EncoderConfig, HeadConfig, ObjectiveConfig, OptimConfig
from fastbyol.model.byol import BYOL
from fastbyol.recipes import PAPER_VIEWS
from fastbyol.train import step
from tests.support.tolerances import KERNEL_STEPS

pytestmark = pytest.mark.usefixtures("short_splits")
TINY = EncoderConfig("resnet8", width=1 / 32, stem="cifar")
HEAD = HeadConfig(hidden=16, out=8)
OPTIM = OptimConfig(base_lr=0.8, weight_decay=1e-3, tau_base=0.9, warmup_epochs=0)
IMAGES, SIDE, CROP = 4, 12, 8


def engine_of(model: BYOL, *, lagged_target: bool) -> step.Eager:
    lars = optim.build(model, {} if lagged_target else model.target_of(), OPTIM)
    return step.Eager(model, lars, lagged_target=lagged_target)


@pytest.mark.parametrize(
    ("lagged_target", "target_statistics", "steps"),
    [(False, "batch", 3), (True, "running", 2)],
    ids=["paper", "lagged-running"],
)
def test_steps_are_the_references(device: str, lagged_target: bool, target_statistics: str, steps: int) -> None:
    model = BYOL(TINY, HEAD, seed=1, target_statistics=target_statistics).to(device).train()
    engines = [engine_of(m, lagged_target=lagged_target) for m in (model, copy.deepcopy(model).double())]
    rng, indices = np.random.default_rng(0), np.arange(IMAGES)
    pixels = torch.from_numpy(rng.integers(0, 256, IMAGES * SIDE * SIDE * 3, np.uint8)).to(device)
    offsets = torch.arange(IMAGES, device=device) * SIDE * SIDE * 3
    sizes = torch.full((IMAGES, 2), SIDE, device=device)
    for number in range(steps):
        drawn = views.draw(
            PAPER_VIEWS, seed=0, epochs=indices * 0 + number, indices=indices, sizes=sizes.cpu().numpy()
        ).to(device)
        losses = [
            engine(
                views.apply(pixels, offsets, sizes, drawn, crop_px=CROP, dtype=dtype), lr=0.1, tau=0.9 + 0.02 * number
            ).loss.item()
            for engine, dtype in zip(engines, (torch.float32, torch.float64), strict=True)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=KERNEL_STEPS)
    ours, theirs = (engine.model.state_dict() for engine in engines)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value.to(ours[name].dtype), rtol=KERNEL_STEPS, atol=KERNEL_STEPS)


@pytest.mark.parametrize(
    "objective",
    [
        ObjectiveConfig(target="constant"),
        ObjectiveConfig(target="online", beta=1.0),
        ObjectiveConfig(beta=1.0, queue=24),
    ],
    ids=["constant", "simclr", "moco"],
)
def test_steps_of_other_objectives_are_the_references(device: str, objective: ObjectiveConfig) -> None:
    torch.manual_seed(0)
    head = HeadConfig(hidden=16, out=8, predictor_depth=0)
    model = BYOL(TINY, head, seed=1, objective=objective).to(device).train()
    engines = [engine_of(m, lagged_target=False) for m in (model, copy.deepcopy(model).double())]
    for _ in range(2):
        images = torch.randn(2 * IMAGES, 3, CROP, CROP, device=device).to(memory_format=torch.channels_last)
        losses = [
            engine(images.to(dtype), lr=0.1, tau=0.9).loss.item()
            for engine, dtype in zip(engines, (torch.float32, torch.float64), strict=True)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=KERNEL_STEPS)
    ours, theirs = (engine.model.state_dict() for engine in engines)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value.to(ours[name].dtype), rtol=KERNEL_STEPS, atol=KERNEL_STEPS)


@pytest.mark.parametrize(("count", "number"), [(3, 0), (2, 2)], ids=["global", "local"])
def test_steps_of_more_views_are_the_references(device: str, count: int, number: int) -> None:
    torch.manual_seed(0)
    head = HeadConfig(hidden=16, out=8, local_predictor=number > 0)
    model = BYOL(TINY, head, seed=1, views=count).to(device).train()
    engines = [engine_of(m, lagged_target=False) for m in (model, copy.deepcopy(model).double())]
    for _ in range(2):
        shapes = [(count * IMAGES, 3, CROP, CROP), (number * IMAGES, 3, CROP // 2, CROP // 2)][: 1 + (number > 0)]
        images = [torch.randn(shape, device=device).to(memory_format=torch.channels_last) for shape in shapes]
        losses = [
            engine(*(each.to(dtype) for each in images), lr=0.1, tau=0.9).loss.item()
            for engine, dtype in zip(engines, (torch.float32, torch.float64), strict=True)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=KERNEL_STEPS)
    ours, theirs = (engine.model.state_dict() for engine in engines)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value.to(ours[name].dtype), rtol=KERNEL_STEPS, atol=KERNEL_STEPS)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, of the inf put in
def test_a_step_with_inf_changes_no_parameter(device: str) -> None:
    engine = engine_of(BYOL(TINY, HEAD, seed=1).to(device), lagged_target=False)
    images = torch.randn(2 * IMAGES, 3, CROP, CROP, device=device).to(memory_format=torch.channels_last)
    engine(images, lr=0.1, tau=0.9)
    before = [p.clone() for p in engine.model.parameters()]
    images[0, 0, 0, 0] = float("inf")
    engine(images, lr=0.1, tau=0.9)
    assert all(torch.equal(p, q) for p, q in zip(engine.model.parameters(), before, strict=True))
    assert all(buffer.isfinite().all() for buffer in engine.model.buffers())
    assert engine.optimizer.skipped.tolist() == [1, 1]
