"""Laws of the LARS kernels against the reference in float64, and of the optimiser that runs on them."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastbyol.kernels import reference
from fastbyol.kernels.lars_ema import Workspace, lars_ema_
from fastbyol.kernels.reference import LarsGroup, LarsRates
from fastbyol.kernels.segments import BLOCK
from fastbyol.optim import LARS
from tests.support.forks import CONTEXT
from tests.support.tolerances import FLOAT32_LARS

pytestmark = pytest.mark.usefixtures("poisoned")
ADAPTING = LarsRates(lr=0.5, momentum=0.9, weight_decay=0.01, trust=0.1, tau=0.75)
PLAIN = LarsRates(lr=0.25, momentum=0.9, weight_decay=0.0, trust=None, tau=0.75)
SHAPES = ((1,), (3, 5), (8, 3, 3, 3), (BLOCK,), (2 * BLOCK + 6,), (7, 1, 1, 2))


def tensors(device: str, seed: int, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    return [(x.to(memory_format=torch.channels_last) if x.ndim == 4 else x).to(device) for x in drawn]


def groups(device: str, *, adapting: LarsRates = ADAPTING, plain: LarsRates = PLAIN) -> list[LarsGroup]:
    """Make a group that adapts and one that does not; the last tensor of each has no target."""
    made = []
    for k, rates in enumerate((adapting, plain)):
        p, g, u, target = (tensors(device, seed) for seed in range(4 * k, 4 * k + 4))
        made.append(LarsGroup(p, g, u, [*target[:-1], None], rates))
    return made


def double(made: list[LarsGroup]) -> list[LarsGroup]:
    return [
        LarsGroup(*([None if x is None else x.detach().double() for x in field] for field in group[:4]), group.rates)
        for group in made
    ]


def state(made: list[LarsGroup]) -> list[Tensor]:
    """Return every tensor that a step may change."""
    return [x for group in made for x in (*group.params, *group.momenta, *group.targets) if x is not None]


def counter(device: str) -> Tensor:
    return torch.zeros(2, dtype=torch.int32, device=device)


def check_step(made: list[LarsGroup], workspace: Workspace | None = None) -> None:
    """Take a step in float32 through the kernels and in float64 through the reference."""
    device = made[0].params[0].device.type
    wide, skipped = double(made), counter(device)
    lars_ema_(made, skipped=skipped, workspace=workspace or Workspace())
    reference.lars_ema_(wide, skipped=counter(device))
    assert skipped.tolist() == [0, 0]
    for x, x_64 in zip(state(made), state(wide), strict=True):
        torch.testing.assert_close(x.double(), x_64, rtol=FLOAT32_LARS, atol=FLOAT32_LARS)


def test_steps_are_the_references(device: str) -> None:
    made, workspace = groups(device), Workspace()
    check_step(made, workspace)
    check_step([g._replace(grads=tensors(device, 9), rates=g.rates._replace(lr=0.1)) for g in made], workspace)


def test_partial_sums_of_many_blocks_are_all_added(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastbyol.kernels.lars_ema.CHUNK", 2)  # three blocks, two chunks
    check_step(groups(device))


@pytest.mark.parametrize("where", ["params", "grads"])
def test_ratio_is_one_where_a_norm_is_zero(device: str, where: str) -> None:
    made = groups(device, adapting=ADAPTING._replace(weight_decay=0.0))
    for x in getattr(made[0], where)[:4]:
        x.zero_()
    check_step(made)


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_tau_one_freezes_the_target_and_tau_zero_copies(device: str, tau: float) -> None:
    made = groups(device, adapting=ADAPTING._replace(tau=tau), plain=PLAIN._replace(tau=tau))
    before = copy.deepcopy(made)
    lars_ema_(made, skipped=counter(device), workspace=Workspace())
    for after, was in zip(made, before, strict=True):
        expected = was.targets if tau else after.params
        assert all(torch.equal(*pair) for pair in zip(after.targets[:-1], expected[:-1], strict=True))


def test_targets_near_tau_one_keep_the_digits_of_one_minus_tau(device: str) -> None:
    """A float32 tau of 0.99999 would move the target by 1.3e-3 of a step too little."""
    p, target = torch.ones(5, device=device), torch.zeros(5, device=device)
    rates = LarsRates(lr=0.0, momentum=0.0, weight_decay=0.0, trust=None, tau=0.99999)
    group = LarsGroup([p], [torch.zeros_like(p)], [torch.zeros_like(p)], [target], rates)
    lars_ema_([group], skipped=counter(device), workspace=Workspace())
    torch.testing.assert_close(target.double(), torch.full_like(target, 1e-5).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_one_bad_gradient_skips_everything_and_is_counted(device: str, bad: float) -> None:
    made, skipped, workspace = groups(device), counter(device), Workspace()
    before = copy.deepcopy(state(made))
    for k, (group, tensor) in enumerate(((0, 0), (1, 4)), start=1):
        good = [g._replace(grads=[x.clone() for x in g.grads]) for g in made]
        good[group].grads[tensor].view(-1)[-1] = bad
        lars_ema_(good, skipped=skipped, workspace=workspace)
        assert skipped.tolist() == [k, k]
        assert all(torch.equal(x, was) for x, was in zip(state(made), before, strict=True))
    lars_ema_(made, skipped=skipped, workspace=workspace)
    assert skipped.tolist() == [2, 0]
    assert not any(torch.equal(x, was) for x, was in zip(state(made), before, strict=True))


def test_gradients_of_other_strides_are_copied_to_the_parameters_layout(
    device: str, caplog: pytest.LogCaptureFixture
) -> None:
    made, workspace = groups(device), Workspace()
    contiguous = [g._replace(grads=[x.contiguous() for x in g.grads]) for g in made]
    assert contiguous[0].grads[2].stride() != made[0].params[2].stride()
    with caplog.at_level(logging.WARNING):
        check_step(contiguous, workspace)
        check_step(contiguous, workspace)
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == 1
    assert "another memory layout" in caplog.records[0].message


def test_gradients_that_are_views_of_a_bucket_need_no_alignment(device: str, caplog: pytest.LogCaptureFixture) -> None:
    made = groups(device)
    bucket, start, views = torch.zeros(20000, device=device), 1, []
    for group in made:
        inside = []
        for g in group.grads:
            view = bucket.as_strided(g.shape, g.stride(), start)
            view.copy_(g)
            inside.append(view)
            start += g.numel()
        views.append(inside)
    with caplog.at_level(logging.WARNING):
        check_step([group._replace(grads=inside) for group, inside in zip(made, views, strict=True)])
    assert "16 bytes" in caplog.text


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: (p[:, ::2], p[:, ::2]),  # gaps
        lambda p: (p[:1].expand(4, 6), torch.zeros_like(p)),  # overlap
        lambda p: (p, torch.zeros(6, 4, device=p.device).t()),  # target in another order
        lambda p: (p.half(), p.half()),
    ],
    ids=["gaps", "overlap", "target", "half"],
)
def test_what_cannot_be_swept_is_refused(device: str, spoil: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    p, target = spoil(torch.ones(4, 6, device=device))
    group = LarsGroup([p], [torch.zeros_like(p)], [torch.zeros_like(p)], [target], PLAIN)
    with pytest.raises(ValueError, match="float32"):
        lars_ema_([group], skipped=counter(device), workspace=Workspace())


@pytest.mark.parametrize("shapes", [((1,),), ((2,),) * 40, SHAPES], ids=["one", "many", "all sizes"])
def test_a_step_is_three_launches_however_many_tensors_of_any_size(
    device: str, shapes: tuple[tuple[int, ...], ...], launches: list[str]
) -> None:
    params = [nn.Parameter(x) for x in tensors(device, 0, shapes)]
    lars = LARS(params, target_of={p: torch.zeros_like(p) for p in params})
    for p in params:
        p.grad = torch.ones_like(p)
    lars.set_rates(lr=0.1, tau=0.9)
    lars.step()
    lars.step()
    assert len(launches) == 2 * 3


def test_a_step_is_seen_by_autograd(device: str) -> None:
    p = nn.Parameter(torch.ones(3, device=device))
    loss = (p * p).sum()
    p.grad = torch.ones_like(p)
    LARS([p], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def network(device: str) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(72, 5))
    return layers.to(device).to(memory_format=torch.channels_last)


def optimizer(model: nn.Module, target: nn.Module) -> LARS:
    weights = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01, "trust": 0.1}]
    rest = [{"params": [p for p in model.parameters() if p.ndim == 1], "trust": None}]
    return LARS(weights + rest, target_of=dict(zip(model.parameters(), target.parameters(), strict=True)))


def train(model: nn.Module, lars: LARS, steps: range) -> None:
    for k in steps:
        for i, p in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(100 * k + i)
            p.grad = torch.randn(p.shape, generator=generator).to(p)
        lars.set_rates(lr=0.5 / (k + 1), tau=0.9)
        lars.step()


def check_equal(modules: list[nn.Module], wide: list[nn.Module]) -> None:
    for module, module_64 in zip(modules, wide, strict=True):
        for x, x_64 in zip(module.parameters(), module_64.parameters(), strict=True):
            torch.testing.assert_close(x.double(), x_64, rtol=5 * FLOAT32_LARS, atol=5 * FLOAT32_LARS)


def test_optimizer_follows_the_reference_over_steps_and_a_round_trip(device: str) -> None:
    model, target = network(device), network(device)
    wide, wide_target = network(device).double(), network(device).double()
    lars, lars_64 = optimizer(model, target), optimizer(wide, wide_target)
    train(model, lars, range(2))
    train(wide, lars_64, range(5))
    with tempfile.TemporaryFile() as file:
        torch.save([model.state_dict(), target.state_dict(), lars.state_dict()], file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    assert all(momentum.keys() == {"momentum"} for momentum in saved[2]["state"].values())
    resumed, resumed_target = network(device), network(device)
    resumed.load_state_dict(saved[0])
    resumed_target.load_state_dict(saved[1])
    restored = optimizer(resumed, resumed_target)
    restored.load_state_dict(saved[2])
    train(resumed, restored, range(2, 5))
    train(model, lars, range(2, 5))
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), resumed.parameters(), strict=True))
    check_equal([model, target, resumed, resumed_target], [wide, wide_target, wide, wide_target])


def test_a_copy_moves_its_own_tensors(device: str) -> None:
    model, target = network(device), network(device)
    lars = optimizer(model, target)
    train(model, lars, range(1))
    before = [p.detach().clone() for p in [*model.parameters(), *target.parameters()]]
    twin, twin_target, twin_lars = copy.deepcopy((model, target, lars))
    train(twin, twin_lars, range(1, 2))
    assert all(torch.equal(*pair) for pair in zip([*model.parameters(), *target.parameters()], before, strict=True))
    train(model, lars, range(1, 2))
    for mine, its in ((model, twin), (target, twin_target)):
        assert all(torch.equal(*pair) for pair in zip(mine.parameters(), its.parameters(), strict=True))


def test_a_model_that_changes_its_layout_takes_its_momenta_along(device: str) -> None:
    model, target = network(device), network(device)
    wide, wide_target = network(device).double(), network(device).double()
    lars, lars_64 = optimizer(model, target), optimizer(wide, wide_target)
    train(model, lars, range(1))
    model.to(memory_format=torch.contiguous_format)
    target.to(memory_format=torch.contiguous_format)
    train(model, lars, range(1, 3))
    train(wide, lars_64, range(3))
    check_equal([model, target], [wide, wide_target])


def test_tau_is_a_device_scalar_that_set_rates_moves(device: str) -> None:
    lars = LARS([nn.Parameter(torch.ones(3, device=device))])
    tau = lars.tau
    lars.set_rates(lr=0.1, tau=0.25)
    assert tau.device.type == device
    assert tau.item() == 0.25


def test_captured_step_follows_set_rates_and_skips(device: str) -> None:
    if device != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    model, target = network(device), network(device)
    wide, wide_target = network(device).double(), network(device).double()
    lars, lars_64 = optimizer(model, target), optimizer(wide, wide_target)
    train(model, lars, range(1))
    train(wide, lars_64, range(1))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lars.step()
    for k in range(1, 4):
        for i, (p, p_64) in enumerate(zip(model.parameters(), wide.parameters(), strict=True)):
            p.grad.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * k + i)))
            p_64.grad.copy_(p.grad)
        for one in (lars, lars_64):
            one.set_rates(lr=0.5 / k, tau=0.8)
        graph.replay()
        lars_64.step()
    check_equal([model, target], [wide, wide_target])
    next(model.parameters()).grad.fill_(torch.inf)
    graph.replay()
    assert lars.skipped.tolist() == [1, 1]
    check_equal([model, target], [wide, wide_target])


def inputs() -> Tensor:
    return torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(5))


def run_steps(model: nn.Module, lars: LARS, images: Tensor) -> None:
    for _ in range(3):
        lars.zero_grad()
        model(images).square().mean().backward()
        lars.set_rates(lr=0.5, tau=0.9)
        lars.step()


def run_rank(rank: int, folder: str) -> None:
    """Train on half of the batch as one of two processes; the first leaves its networks behind."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, target = network("cpu"), network("cpu")
    lars = optimizer(model, target)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    run_steps(wrapped, lars, inputs().chunk(2)[rank])
    if rank == 0:
        torch.save([model.state_dict(), target.state_dict()], Path(folder) / "networks.pt")
    dist.destroy_process_group()


def test_two_processes_are_one_on_the_joined_batch(tmp_path: Path) -> None:
    processes = [CONTEXT.Process(target=run_rank, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    model, target = network("cpu"), network("cpu")
    run_steps(model, optimizer(model, target), inputs())
    for module, saved in zip((model, target), torch.load(tmp_path / "networks.pt", weights_only=True), strict=True):
        for name, x in module.state_dict().items():
            torch.testing.assert_close(saved[name], x, rtol=FLOAT32_LARS, atol=FLOAT32_LARS)
