"""Laws of the folded target that only a GPU can show: what cuDNN's epilogues compute, and that a graph folds anew."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbyol import optim
from fastbyol.byol import BYOL
from fastbyol.config import EncoderConfig, HeadConfig, OptimConfig
from fastbyol.kernels.convolution import Epilogue
from fastbyol.train import step
from tests.support.tolerances import BF16_LOSS, BF16_ULP

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

SMALL = EncoderConfig("resnet50", width=1 / 4, stem="cifar")
HEAD = HeadConfig(hidden=64, out=32)
OPTIM = OptimConfig(base_lr=0.4, weight_decay=1e-6, tau_base=0.9, warmup_epochs=0)
IMAGES, SIDE = 16, 14
KINDS = [(size, stride, has_sum) for size in (1, 3) for stride in (1, 2) for has_sum in (False, True)]


def drawn(*shape: int, seed: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").bfloat16()
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def case_of(size: int, stride: int, *, has_sum: bool) -> tuple[list[Tensor], Tensor | None, dict[str, int], Tensor]:
    """Draw input, weight and bias, a residual or None, the window, and the result in float64."""
    window = {"stride": stride, "padding": size // 2}
    tensors = [drawn(IMAGES, 64, SIDE, SIDE, seed=0), drawn(128, 64, size, size, seed=1) / 8, drawn(128, seed=2)]
    expected = F.conv2d(*(x.double() for x in tensors), **window)
    residual = drawn(*expected.shape, seed=3) if has_sum else None
    expected = (expected if residual is None else expected + residual.double()).relu()
    with_nan = torch.full_like(expected, torch.nan, dtype=torch.bfloat16)
    del with_nan  # its memory is the next result's
    return tensors, residual, window, expected


def check(found: Tensor, expected: Tensor, *, error: float = 1e-3) -> None:
    """Compare to one unit in the last place, or this share of the largest result."""
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.double(), expected, rtol=BF16_ULP, atol=error * expected.max().item())


@pytest.mark.parametrize(("size", "stride", "has_sum"), KINDS)
@pytest.mark.parametrize("searches", [False, True])
def test_an_epilogue_is_the_operations_one_by_one(size: int, stride: int, *, has_sum: bool, searches: bool) -> None:
    epilogue = Epilogue(searches=searches)
    with torch.backends.cudnn.flags(enabled=True, benchmark=searches):
        tensors, residual, window, expected = case_of(size, stride, has_sum=has_sum)
        check(epilogue(*tensors, residual, **window), expected)
    assert not epilogue.reasons


@pytest.mark.xfail(strict=False, reason="it multiplies what was there by 0; kernels/convolution.py does without it")
@pytest.mark.parametrize(("size", "stride"), [(size, stride) for size, stride, has_sum in KINDS if has_sum])
def test_torchs_convolution_with_relu_ignores_what_was_in_its_result(size: int, stride: int) -> None:
    tensors, _, window, expected = case_of(size, stride, has_sum=False)
    sides = [[window["stride"]] * 2, [window["padding"]] * 2, [1, 1]]
    check(torch.cudnn_convolution_relu(*tensors, *sides, 1), expected)


def test_what_has_no_epilogue_is_computed_plainly_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    epilogue = Epilogue()
    tensors, residual, window, expected = case_of(3, 1, has_sum=True)
    with caplog.at_level(logging.WARNING), torch.backends.cudnn.flags(enabled=True, deterministic=True):
        for _ in range(2):
            check(epilogue(*tensors, residual, **window), expected, error=BF16_ULP)  # rounded after every operation
    assert len(caplog.records) == 1
    assert "deterministic" in caplog.text


def model_and_views() -> tuple[BYOL, Tensor]:
    model = BYOL(SMALL, HEAD, seed=1, target_statistics="running", folded_target=True).cuda()
    views = torch.randn(2 * IMAGES, 3, 32, 32, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
    return model, views.to(memory_format=torch.channels_last)


def engine_of(model: BYOL) -> step.Eager:
    return step.engine("graph", model, optim.build(model, model.target_of(), OPTIM), precision="bfloat16")


def test_a_graph_folds_what_every_step_has_moved() -> None:
    model, views = model_and_views()
    engine = engine_of(model)
    for _ in range(step.WARM_UP + 3):
        engine(views, lr=0.1, tau=0.5)
    with torch.no_grad(), engine.autocast():
        expected = model.target(views).double()  # of weights and statistics that the next replay begins with
    found = engine(views, lr=0.1, tau=0.5).target_projections.double()
    assert (found - expected).norm() <= BF16_LOSS * expected.norm()
    assert model.folded_target is not None
    assert not model.folded_target.epilogue.reasons


def test_steps_with_a_folded_target_never_wait_for_the_gpu() -> None:
    model, views = model_and_views()
    engine = engine_of(model)
    for _ in range(step.WARM_UP + 2):
        engine(views, lr=0.1, tau=0.9)
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine(views, lr=0.1, tau=0.9)
        with engine.autocast():
            model(views)  # eager
    finally:
        torch.cuda.set_sync_debug_mode("default")
