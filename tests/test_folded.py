"""Laws of the folded target: it projects as the target that it stands for, whatever training has moved."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fastbyol import optim
from fastbyol.byol import BYOL
from fastbyol.config import EncoderConfig, HeadConfig, OptimConfig
from fastbyol.encoder import ResNet, build
from fastbyol.errors import ConfigError
from fastbyol.folded import FoldedResNet
from fastbyol.recipes import named
from fastbyol.train import step
from tests.support.tolerances import FLOAT64_ATOL, FLOAT64_RTOL, NAIVE_STEPS_RTOL

TINY = EncoderConfig("resnet8", width=1 / 16, stem="cifar")
HEAD = HeadConfig(hidden=16, out=8)
OPTIM = OptimConfig(base_lr=0.8, weight_decay=1e-3, tau_base=0.9, warmup_epochs=0)


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(12, 3, 16, 16, dtype=torch.float64, generator=generator) for _ in range(count)]


def model_of(*, folded_target: bool) -> BYOL:
    return BYOL(TINY, HEAD, seed=1, target_statistics="running", folded_target=folded_target).double()


def engine_of(model: BYOL, kind: type[step.Eager] = step.Eager, **options: str) -> step.Eager:
    return kind(model, optim.build(model, model.target_of(), OPTIM), **options)


def encoder_of(config: EncoderConfig) -> ResNet:
    """Build an encoder whose batch norms have all moved."""
    encoder, generator = build(config, seed=0).eval(), torch.Generator().manual_seed(1)
    for layer in encoder.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for x, at, spread in ((layer.weight, 1, 0.3), (layer.bias, 0, 0.3), (layer.running_mean, 0, 0.1)):
                x.data.normal_(at, spread, generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
    return encoder


@pytest.mark.parametrize(
    ("arch", "stem", "side"),
    [("resnet8", "cifar", 9), ("resnet18", "cifar_stride2", 16), ("resnet50", "imagenet", 40)],
)
def test_a_folded_encoder_is_the_encoder(arch: str, stem: str, side: int) -> None:
    encoder = encoder_of(EncoderConfig(arch, width=1 / 16, stem=stem)).double()
    images = torch.randn(3, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = encoder(images)
    assert expected.std() > 0.01
    torch.testing.assert_close(FoldedResNet(encoder)(images), expected, rtol=FLOAT64_RTOL, atol=FLOAT64_ATOL)


def test_bfloat16_rounds_a_folded_encoder_no_worse() -> None:
    encoder = encoder_of(EncoderConfig("resnet18", width=1 / 4, stem="cifar"))
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = copy.deepcopy(encoder).double()(images.double())
        with torch.autocast("cpu", torch.bfloat16):
            found = [forward(images) for forward in (encoder, FoldedResNet(encoder))]
    assert found[1].dtype == torch.bfloat16
    apart, folded = ((x.double() - exact).norm() / exact.norm() for x in found)
    assert folded < 2 * apart < 0.05


def test_training_with_a_folded_target_is_training_without() -> None:
    engines = [engine_of(model_of(folded_target=folded_target)) for folded_target in (False, True)]
    for views in batches(4):
        outputs = [engine(views, lr=0.5, tau=0.75) for engine in engines]
        torch.testing.assert_close(
            outputs[0].target_projections, outputs[1].target_projections, rtol=NAIVE_STEPS_RTOL, atol=FLOAT64_ATOL
        )
    unfolded, folded = (engine.model.state_dict() for engine in engines)
    assert unfolded.keys() == folded.keys()
    for name, value in unfolded.items():
        torch.testing.assert_close(folded[name], value, rtol=NAIVE_STEPS_RTOL, atol=FLOAT64_ATOL)


def test_a_folded_target_follows_every_step() -> None:
    model = model_of(folded_target=True)
    engine, (views, *rest) = engine_of(model), batches(4)
    found = [model(views).target_projections]
    for others in rest:
        engine(others, lr=0.5, tau=0.75)
        found.append(model(views).target_projections)
        with torch.no_grad():
            expected = model.target(views)
        torch.testing.assert_close(found[-1], expected, rtol=FLOAT64_RTOL, atol=FLOAT64_ATOL)
        assert not torch.allclose(found[-1], found[-2], rtol=1e-3)


def test_a_copied_model_folds_its_own_target() -> None:
    model = model_of(folded_target=True)
    copied, views = copy.deepcopy(model), batches(1)[0]
    for parameter in copied.target.parameters():
        parameter.data.mul_(1.5)
    with torch.no_grad():
        expected = copied.target(views)
    torch.testing.assert_close(copied(views).target_projections, expected, rtol=FLOAT64_RTOL, atol=FLOAT64_ATOL)


@pytest.mark.slow
def test_a_compiled_step_with_a_folded_target_is_the_eager_one() -> None:
    engines = [
        engine_of(model_of(folded_target=True)),
        engine_of(model_of(folded_target=True), step.Compiled, backend="aot_eager"),
    ]
    for views in batches(2):
        losses = [engine(views, lr=0.1, tau=0.9).loss.item() for engine in engines]
        assert losses[0] == pytest.approx(losses[1], rel=NAIVE_STEPS_RTOL)


def test_others_encoders_are_refused() -> None:
    class Own(ResNet):
        """An encoder whose forward nobody here knows."""

    with pytest.raises(ConfigError, match="only fastbyol's own ResNets"):
        FoldedResNet(Own(TINY))


def test_a_recipe_folds_running_statistics_only() -> None:
    recipe = named("cifar10_tiny")
    assert replace(recipe, target_statistics="running", folded_target=True).folded_target
    with pytest.raises(ConfigError, match="target_statistics running, not batch"):
        replace(recipe, folded_target=True)
