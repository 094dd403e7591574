"""Laws of the batch-norm kernels against the reference in float64."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastbyol.config import EncoderConfig
from fastbyol.kernels import batchnorm, reference
from fastbyol.kernels.reference import NormParams
from fastbyol.model.resnet import ARCHS, Bottleneck, build
from tests.support.tolerances import FLOAT32_BATCHNORM, FLOAT32_BATCHNORM_COLD, FLOAT32_NETWORK, HALF_ULPS

pytestmark = pytest.mark.usefixtures("poisoned")
MOMENTUM, EPS = 0.1, 1e-5
SHAPES = [  # views, then [B, C] or [B, C, H, W]
    (1, (2, 1)),
    (3, (2, 5)),
    (2, (40, 65)),  # a column block with one channel
    (2, (1, 1, 3, 1)),
    (3, (2, 7, 5, 3)),
    (2, (2, 72, 7, 5)),
    (2, (2, 64, 9, 9)),  # several splits of several tiles
]


class Case(NamedTuple):
    """What a batch norm reads and updates; residual and dz, one for each result, may be missing."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    batches: Tensor
    dz: tuple[Tensor | None, ...]


class Outcome(NamedTuple):
    """What a batch norm returns, its gradients, and the statistics it updated."""

    z: Tensor
    dx: Tensor
    d_residual: Tensor | None
    d_weight: Tensor
    d_bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    batches: Tensor


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def draw(
    views: int,
    shape: Sequence[int],
    device: str,
    *,
    dtype: torch.dtype = torch.float32,
    arriving: str = "only",
    mean: float = 0.5,
    std: float = 1.5,
    running_mean: float = 0.25,
) -> Case:
    """Draw a case; `arriving` names the results that receive a gradient: the only one, or first, second, both."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    full, channels = (views * shape[0], *shape[1:]), shape[1]
    maps = [channels_last(normal(*full).to(device, dtype)) for _ in range(4)]
    gradients = {"only": (maps[2],), "first": (maps[2], None), "second": (None, maps[3]), "both": (maps[2], maps[3])}
    return Case(
        channels_last((normal(*full) * std + mean).to(device, dtype)),
        None if arriving == "only" else maps[1],
        normal(channels).to(device),
        normal(channels).to(device),
        (normal(channels) * 0.1 + running_mean).to(device),
        (normal(channels).abs() + 0.5).to(device),
        torch.tensor(3, device=device),
        gradients[arriving],
    )


def in_float64(case: Case) -> Case:
    def wide(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.double()

    *floats, batches, dz = case
    return Case(*(wide(x) for x in floats), batches.clone(), tuple(wide(x) for x in dz))


def norm_of(case: Case, *, views: int, group: dist.ProcessGroup | None = None) -> NormParams:
    return NormParams(*case[2:7], views=views, momentum=MOMENTUM, eps=EPS, group=group)


def outcome(module: ModuleType, case: Case, *, views: int, relu: bool = True) -> Outcome:
    """Run forward and backward; the case's own statistics are left alone."""
    case = copy.deepcopy(case)
    leaves = [None if x is None else x.requires_grad_() for x in case[:4]]
    x, residual, *_ = leaves
    norm = norm_of(case, views=views)
    if residual is None:
        results = (module.batch_norm_act(x, norm, relu=relu),)
    else:
        results = module.batch_norm_add_relu(x, residual, norm)
    pairs = [(z, dz) for z, dz in zip(results, case.dz, strict=True) if dz is not None]
    torch.autograd.backward([z for z, _ in pairs], [dz for _, dz in pairs])
    gradients = [None if leaf is None else leaf.grad for leaf in leaves]
    return Outcome(results[0].detach(), *gradients, *case[4:7])


def steepest(case: Case, views: int) -> float:
    """Return the largest factor from g to dx."""
    x = case.x.double().unflatten(0, (views, -1))
    variance = x.var([i for i in range(x.ndim) if i not in (0, 2)], correction=0)
    return (case.weight * torch.rsqrt(variance + EPS)).abs().max().item()


def check(case: Case, *, views: int, relu: bool = True, atol: float = FLOAT32_BATCHNORM) -> None:
    ours = outcome(batchnorm, case, views=views, relu=relu)
    expected = outcome(reference, in_float64(case), views=views, relu=relu)
    ulp = HALF_ULPS.get(case.x.dtype, 0.0)
    rounded_g = 0.0
    if None not in case.dz and len(case.dz) == 2:  # the sum of two gradients is rounded before dx is made of it
        rounded_g = ulp * steepest(case, views) * expected.d_residual.abs().max().item()
    slack = {
        "z": (ulp, atol),
        "dx": (ulp, atol + rounded_g),
        "d_residual": (ulp, atol),
        "d_weight": (0.0, 10 * atol),
        "d_bias": (0.0, 10 * atol),
        "running_mean": (0.0, atol),
        "running_var": (0.0, atol),
        "batches": (0.0, 0.0),
    }
    for name, (rtol, atol_of) in slack.items():
        got, want = getattr(ours, name), getattr(expected, name)
        if want is None:
            assert got is None
            continue
        torch.testing.assert_close(got.to(want.dtype), want, rtol=rtol, atol=atol_of, msg=lambda m, n=name: f"{n}: {m}")
    assert ours.z.dtype == ours.dx.dtype == case.x.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("views", "shape"), SHAPES, ids=str)
def test_forward_and_gradients_are_the_references(
    device: str, views: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    check(draw(views, shape, device, dtype=dtype), views=views)


def test_without_relu_nothing_is_masked(device: str) -> None:
    check(draw(2, (3, 20, 4, 4), device), views=2, relu=False)


def test_half_precision_is_normalised_in_float32(device: str) -> None:
    check(draw(2, (3, 20, 4, 4), device, dtype=torch.float16), views=2)


@pytest.mark.parametrize("arriving", ["first", "second", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("views", "shape"), [(3, (2, 5)), (2, (2, 72, 5, 3))], ids=str)
def test_gradients_of_both_results_are_summed(
    device: str, views: int, shape: tuple[int, ...], dtype: torch.dtype, arriving: str
) -> None:
    check(draw(views, shape, device, dtype=dtype, arriving=arriving), views=views)


@pytest.mark.parametrize(("running_mean", "atol"), [(29.0, FLOAT32_BATCHNORM), (0.0, FLOAT32_BATCHNORM_COLD)])
def test_a_large_mean_does_not_cancel(device: str, running_mean: float, atol: float) -> None:
    check(draw(2, (4, 24, 6, 6), device, mean=30, std=2, running_mean=running_mean), views=2, atol=atol)


def test_any_layout_gives_the_same_result_and_a_copy_is_told_once(
    device: str, caplog: pytest.LogCaptureFixture
) -> None:
    batchnorm._warn_of_copy.cache_clear()
    case = draw(2, (2, 20, 5, 3), device, arriving="both")
    gradient = torch.randn(4, 20, 1, 1, device=device).expand(4, 20, 5, 3)  # as it comes from a mean over H and W
    case = case._replace(dz=(gradient, case.dz[1]))
    ours = outcome(batchnorm, case, views=2)
    every_other = torch.zeros(4, 40, 5, 6, device=device)[:, ::2, :, ::2].copy_(case.x)
    with caplog.at_level(logging.WARNING, "fastbyol.kernels.batchnorm"):
        for x in (case.x.contiguous(), every_other):
            other = outcome(batchnorm, case._replace(x=x), views=2)
            assert all(torch.equal(a, b) for a, b in zip(ours, other, strict=True))
    assert [record.message for record in caplog.records] == [
        "batch norm got x in another memory format and copies it to channels-last, which is slower"
    ]


def test_a_step_is_three_launches_each_way(device: str, launches: list[str]) -> None:
    case = draw(2, (2, 20, 3, 3), device, arriving="both")
    outcome(batchnorm, case, views=2)
    forward = ["stats_kernel", "finalize_kernel", "apply_kernel"]
    assert launches == [*forward, "backward_sums_kernel", "join_kernel", "backward_apply_kernel"]


def test_results_do_not_change_from_run_to_run(device: str) -> None:
    case = draw(2, (2, 20, 5, 5), device, dtype=torch.bfloat16, arriving="both")
    first, again = (outcome(batchnorm, case, views=2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def add_relu(case: Case) -> tuple[Tensor, Tensor]:
    return batchnorm.batch_norm_add_relu(case.x, case.residual, norm_of(case, views=2))


def test_both_results_are_the_same_memory(device: str) -> None:
    case = draw(2, (2, 5), device, arriving="both")
    case.x.requires_grad_()
    z, twin = add_relu(case)
    assert z is not twin
    assert z.data_ptr() == twin.data_ptr()


def test_a_network_without_gradients_gets_the_same_result(device: str) -> None:
    case = draw(2, (2, 5, 3, 3), device, arriving="both")
    with torch.no_grad():
        z, _ = add_relu(copy.deepcopy(case))
    assert not z.requires_grad
    assert torch.equal(z, outcome(batchnorm, case, views=2).z)


def test_only_wanted_gradients_are_computed(device: str, launches: list[str]) -> None:
    case = draw(2, (2, 5), device)
    weight = case.weight.requires_grad_()
    batchnorm.batch_norm_act(case.x, norm_of(case, views=2), relu=True).sum().backward()
    assert weight.grad is not None
    assert case.x.grad is None
    assert "backward_apply_kernel" not in launches


def test_a_second_derivative_is_refused(device: str) -> None:
    case = draw(2, (2, 5), device, arriving="both")
    x = case.x.requires_grad_()
    (dx,) = torch.autograd.grad(add_relu(case)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.fixture(params=["alone", "synced"])
def group(request: pytest.FixtureRequest, device: str) -> Iterator[dist.ProcessGroup | None]:
    """Yield no process group, then one of a single rank."""
    if request.param == "alone":
        yield None
        return
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, of the inf put in
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_batch_that_overflows_leaves_its_channels_statistics(
    device: str, group: dist.ProcessGroup | None, bad: float
) -> None:
    case = draw(2, (4, 3, 2, 2), device)
    statistics = []
    for module, dtype in ((batchnorm, torch.float32), (reference, torch.float64)):
        tensors = [x.to(dtype, copy=True) for x in case[2:6]]
        mean, var = tensors[2:]
        norm = NormParams(*tensors, None, views=2, momentum=MOMENTUM, eps=EPS, group=group)
        spoilt, good = (case.x.to(dtype, copy=True) for _ in range(2))
        spoilt[0, 1, 0, 0] = bad  # in the first view, before a good one
        module.batch_norm_act(spoilt, norm, relu=True)
        changed = torch.stack((mean != case.running_mean, var != case.running_var))
        assert changed.tolist() == [[True, False, True]] * 2
        module.batch_norm_act(good, norm, relu=True)
        assert (mean != case.running_mean).all()
        assert (var != case.running_var).all()
        with torch.no_grad():
            assert module.batch_norm_eval(good, None, norm, relu=True).isfinite().all()
        statistics.append(torch.stack((mean, var)).double())
    torch.testing.assert_close(*statistics, rtol=0, atol=FLOAT32_BATCHNORM)


def test_nan_passes_the_relu(device: str) -> None:
    case = draw(2, (4, 3), device, arriving="both")
    case.x[0, 1] = torch.nan
    z, _ = add_relu(case)
    assert z[:4, 1].isnan().all()
    assert z.isnan().sum() == 4


@pytest.mark.parametrize("has_residual", [False, True])
def test_evaluation_is_one_launch_with_the_running_statistics(
    device: str, launches: list[str], has_residual: bool
) -> None:
    case = draw(1, (3, 20, 5, 3), device, arriving="first" if has_residual else "only")
    with torch.no_grad():
        z = batchnorm.batch_norm_eval(case.x, case.residual, norm_of(case, views=1), relu=has_residual)
    assert launches == ["apply_kernel"]
    wide = in_float64(case)
    expected = reference.batch_norm_eval(wide.x, wide.residual, norm_of(wide, views=1), relu=has_residual)
    torch.testing.assert_close(z.double(), expected, rtol=0, atol=FLOAT32_BATCHNORM)


def test_evaluation_has_gradients(device: str) -> None:
    case = draw(1, (3, 5), device, arriving="first")
    x = case.x.requires_grad_()
    batchnorm.batch_norm_eval(x, case.residual, norm_of(case, views=1), relu=True).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("shape", "views", "message"),
    [((5, 3), 2, "equal size"), ((2, 3), 2, "one value per channel"), ((4, 2), 2, "channels"), ((4, 3, 2), 2, "give")],
)
def test_what_cannot_be_normalised_is_refused(device: str, shape: tuple[int, ...], views: int, message: str) -> None:
    case = draw(2, (2, 3), device)
    norm = norm_of(case, views=views)
    for module in (batchnorm, reference):
        with pytest.raises(ValueError, match=message):
            module.batch_norm_act(torch.ones(shape, device=device), norm, relu=True)


def test_a_residual_of_another_shape_is_refused(device: str) -> None:
    case = draw(2, (2, 3), device, arriving="both")
    with pytest.raises(ValueError, match="equal shapes"):
        add_relu(case._replace(residual=case.residual[:2]))


@pytest.mark.usefixtures("short_splits")
def test_a_networks_gradients_are_the_references(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # the convolutions are not what is compared
    ours = build(EncoderConfig("resnet8", width=1 / 8, stem="cifar"), seed=0, views=2).to(device)
    wide = copy.deepcopy(ours).double()
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
    ours(images).square().sum().backward()
    wide(images.double()).square().sum().backward()
    for (name, p), p_64 in zip(ours.named_parameters(), wide.parameters(), strict=True):
        scale = p_64.grad.norm()
        assert (p.grad - p_64.grad).norm() <= FLOAT32_NETWORK * scale, name


def test_a_trace_records_operations_and_no_results(device: str) -> None:
    encoder = build(EncoderConfig("resnet8", width=1 / 8, stem="cifar"), seed=0).to(device).eval()
    first, other = torch.randn(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.inference_mode():
        traced = torch.jit.trace(encoder, first)
        torch.testing.assert_close(traced(other), encoder(other))


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="asks a GPU's driver")


@pytest.mark.gpu
@on_gpu
def test_nothing_waits_for_the_host() -> None:
    case = draw(2, (4, 64, 8, 8), "cuda", dtype=torch.bfloat16, arriving="both")
    x = case.x.requires_grad_()
    torch.autograd.grad(add_relu(case), x, case.dz)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(add_relu(case), x, case.dz)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@on_gpu
def test_a_captured_step_is_the_step() -> None:
    case = draw(2, (4, 64, 8, 8), "cuda", dtype=torch.bfloat16, arriving="both")
    expected = outcome(batchnorm, case, views=2)  # compiles
    x = case.x.requires_grad_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = add_relu(case)
        (dx,) = torch.autograd.grad(results, x, case.dz)
    graph.replay()
    for got, want in ((results[0], expected.z), (dx, expected.dx), (case.running_mean, expected.running_mean)):
        assert torch.equal(got, want)


@pytest.mark.usefixtures("short_splits")
def test_recomputed_activations_give_the_same_bits_and_are_not_kept(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHS, "resnet50", (Bottleneck, (2, 1)))  # its blocks, three of them
    config, kept, grads = EncoderConfig("resnet50", width=1 / 16, stem="cifar"), [], []
    images = channels_last(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))).to(device)
    for recomputes in (False, True):
        encoder = build(config, seed=0, views=2).to(device)
        encoder.set_recompute(recomputes)
        saved: list[Tensor] = []
        block = encoder.layer1[1]
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            encoder(images).square().sum().backward()
        kept.append(sum(t.nbytes for t in saved))
        grads.append([p.grad for p in encoder.parameters()])
        assert block.bn1.running_mean.abs().sum() > 0
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    assert kept[1] < kept[0]
