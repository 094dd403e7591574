"""Laws of the step's engines and of its two departures from the paper."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from fastbyol import optim
from fastbyol.config import EncoderConfig, HeadConfig, OptimConfig
from fastbyol.errors import ConfigError
from fastbyol.model.byol import BYOL, Output
from fastbyol.optim import LARS
from fastbyol.train import step
from tests.support.tolerances import BF16_LOSS, FLOAT64_ATOL, NAIVE_STEPS_RTOL

TINY = EncoderConfig("resnet8", width=1 / 16, stem="cifar")
HEAD = HeadConfig(hidden=16, out=8)
OPTIM = OptimConfig(base_lr=0.8, weight_decay=1e-3, tau_base=0.9, warmup_epochs=0)


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(12, 3, 16, 16, dtype=torch.float64, generator=generator) for _ in range(count)]


def model_of(**options: str) -> BYOL:
    return BYOL(TINY, HEAD, seed=1, **options).double()


def with_optimizer(model: BYOL, *, lagged_target: bool = False) -> tuple[BYOL, LARS]:
    return model, optim.build(model, {} if lagged_target else model.target_of(), OPTIM)


def test_compiled_step_is_the_eager_step() -> None:
    engines = [step.Eager(*with_optimizer(model_of())), step.Compiled(*with_optimizer(model_of()), backend="aot_eager")]
    for views in batches(3):
        losses = [engine(views, lr=0.1, tau=0.9).loss.item() for engine in engines]
        assert losses[0] == pytest.approx(losses[1], rel=NAIVE_STEPS_RTOL)
    eager, compiled = (engine.model.state_dict() for engine in engines)
    assert eager.keys() == compiled.keys()
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=NAIVE_STEPS_RTOL, atol=FLOAT64_ATOL)


def test_lagged_target_is_the_exact_target_one_step_late() -> None:
    """A step's lagged target equals tau * target + (1 - tau) * the parameters before that step."""
    engine = step.Eager(*with_optimizer(model_of(), lagged_target=True), lagged_target=True)
    for views in batches(3):
        target, online = (
            copy.deepcopy(list(branch.parameters())) for branch in (engine.model.target, engine.model.online)
        )
        engine(views, lr=0.5, tau=0.75)
        for now, xi, theta in zip(engine.model.target.parameters(), target, online, strict=True):
            torch.testing.assert_close(now.detach(), 0.75 * xi.detach() + 0.25 * theta.detach())
    exact = step.Eager(*with_optimizer(model_of()))
    for views in batches(2):
        exact(views, lr=0.5, tau=0.75)
    assert not torch.equal(exact.model.target.encoder.conv1.weight, engine.model.target.encoder.conv1.weight)


def test_target_on_running_statistics_follows_the_online_networks() -> None:
    engine = step.Eager(*with_optimizer(model_of(target_statistics="running")))
    engine.model.train()
    assert not engine.model.target.encoder.bn1.training
    mean = engine.model.target.encoder.bn1.running_mean.clone()
    engine(batches(1)[0], lr=0.1, tau=0.75)
    online, target = engine.model.online.encoder.bn1, engine.model.target.encoder.bn1
    torch.testing.assert_close(target.running_mean, 0.75 * mean + 0.25 * online.running_mean)
    assert target.num_batches_tracked == 0


def test_target_on_running_statistics_ignores_who_shares_its_batch() -> None:
    model = model_of(target_statistics="running").train()
    views = batches(1)[0]
    alone = model(views).target_projections[:1].clone()
    views[1:] += 3
    torch.testing.assert_close(model(views).target_projections[:1], alone)


def test_bfloat16_keeps_parameters_and_loss_in_float32() -> None:
    losses = []
    for precision in (torch.float32, torch.bfloat16):
        engine = step.Eager(*with_optimizer(model_of().float()), precision=precision)
        output = engine(batches(1)[0].to(precision), lr=0.1, tau=0.9)
        assert output.loss.dtype == torch.float32
        assert {p.dtype for p in engine.model.parameters()} == {torch.float32}
        losses.append(output.loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=BF16_LOSS)


@pytest.mark.parametrize("name", ["graph", "compile"])
def test_engines_of_the_gpu_are_refused_on_the_cpu(name: str) -> None:
    with pytest.raises(ConfigError, match="needs a GPU"):
        step.engine(name, *with_optimizer(model_of()))


def test_an_unknown_engine_or_precision_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="eager, graph, compile"):
        step.engine("turbo", *with_optimizer(model_of()))
    with pytest.raises(ConfigError, match="float32, bfloat16"):
        step.engine("eager", *with_optimizer(model_of()), precision="fp8")


def test_accumulation_is_one_step_of_the_mean_gradient_with_one_ema() -> None:
    """Two parts: the gradient is the mean of both, momentum, target and count move once."""
    views = batches(2)
    engine = step.Eager(*with_optimizer(model_of()))
    output = engine.accumulate(zip(views), count=2, lr=0.1, tau=0.9)
    model, optimizer = with_optimizer(model_of())
    losses = [model(part).loss for part in views]
    (sum(losses) / 2).backward()
    optimizer.set_rates(lr=0.1, tau=0.9)
    optimizer.step()
    assert output.loss.item() == pytest.approx(sum(loss.item() for loss in losses) / 2, rel=NAIVE_STEPS_RTOL)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(engine.model.state_dict()[name], value, rtol=NAIVE_STEPS_RTOL, atol=FLOAT64_ATOL)


def test_accumulating_one_part_is_a_plain_step() -> None:
    plain, other = (step.Eager(*with_optimizer(model_of())) for _ in range(2))
    for views in batches(2):
        plain(views, lr=0.1, tau=0.9)
        other.accumulate([(views,)], count=1, lr=0.1, tau=0.9)
    assert all(torch.equal(value, other.model.state_dict()[name]) for name, value in plain.model.state_dict().items())


class Recorded(step.Graph):
    """The graph engine with a capture that a CPU can replay; it counts how many are held at a time."""

    def __init__(self, model: BYOL, optimizer: LARS) -> None:
        super().__init__(model, optimizer)
        self.held: list[weakref.ref[step.CapturedWork]] = []
        self.most_held = self.eager = 0

    @contextmanager
    def _on_capture_stream(self) -> Iterator[None]:
        self.eager += 1
        yield

    def _free_memory(self) -> None:
        gc.collect()

    def _capture(self, views: step.Views, work: Callable[..., Output]) -> step.CapturedWork:
        static, shown = tuple(map(torch.empty_like, views)), work(*views)
        assert self.model.online.encoder.conv1.weight.grad is not None
        for parameter in self.model.parameters():  # recording runs nothing
            parameter.grad = None if self._shape[0] == 1 or parameter.grad is None else parameter.grad.zero_()

        def replay() -> None:
            for kept, made in zip(shown, work(*static), strict=True):
                kept.detach().copy_(made.detach())

        captured = step.CapturedWork(replay, static, Output(*(value.detach() for value in shown)))
        self.held.append(weakref.ref(captured))
        self.most_held = max(self.most_held, sum(held() is not None for held in self.held))
        return captured


def test_graphs_of_micro_batches_take_the_eager_steps() -> None:
    engines = [step.Eager(*with_optimizer(model_of())), Recorded(*with_optimizer(model_of()))]
    for first, second in zip(batches(12)[::2], batches(12)[1::2], strict=True):
        outputs = [engine.accumulate(zip((first, second)), count=2, lr=0.1, tau=0.9) for engine in engines]
        assert torch.equal(outputs[0].loss, outputs[1].loss)
        assert torch.equal(outputs[0].representations, outputs[1].representations)
    assert engines[1].eager == step.WARM_UP
    assert len(engines[1].held) == 1
    torch.testing.assert_close(*(list(engine.model.parameters()) for engine in engines), rtol=1e-12, atol=1e-12)


def test_a_crop_ramp_holds_one_graph_at_a_time() -> None:
    engine = Recorded(*with_optimizer(model_of()))
    for side in (8, 12, 16):
        for views in batches(step.WARM_UP + 2):
            engine(views[:, :, :side, :side], lr=0.1, tau=0.9)
    assert (len(engine.held), engine.most_held, engine.eager) == (3, 1, 3 * step.WARM_UP)
