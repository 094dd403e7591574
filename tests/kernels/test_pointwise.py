"""Laws of the 1x1 convolution with statistics: its values are conv2d's, its statistics are batch norm's of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastbyol.config import EncoderConfig
from fastbyol.kernels import pointwise, reference
from fastbyol.kernels.batchnorm import batch_norm_act, batch_norm_add_relu
from fastbyol.kernels.batchnorm_statistics import batch_statistics
from fastbyol.kernels.pointwise import Tiles, pointwise_statistics
from fastbyol.kernels.reference import NormParams
from fastbyol.model.batchnorm import join_convolutions_
from fastbyol.model.resnet import ARCHS, Bottleneck, ResNet, build
from tests.support.tolerances import FLOAT32_BATCHNORM, FLOAT32_NETWORK, HALF_ULPS

pytestmark = pytest.mark.usefixtures("poisoned")
MOMENTUM, EPS = 0.1, 1e-5
# the interpreter multiplies the bits of bfloat16 as integers
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
SHAPES = [  # views, images a view, K, H, W, N
    (1, 2, 8, 1, 1, 8),
    (3, 1, 8, 3, 1, 16),  # blocks across the views' ends
    (2, 3, 16, 7, 5, 24),
    (2, 1, 72, 17, 9, 136),  # several blocks of rows, inputs and columns, none of them full
    (1, 2, 64, 16, 16, 64),  # full ones
]


def drawn(*shape: int, device: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def drawn_case(
    shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, NormParams]:
    """Draw x in channels-last memory, a weight and a batch norm, whose running mean is not the outputs'."""
    views, images, inputs, height, width, channels = shape
    x = drawn(views * images, inputs, height, width, device=device, dtype=dtype) + 0.5
    weight = drawn(channels, inputs, 1, 1, device=device, seed=1, dtype=dtype) / inputs**0.5
    mean, scale, bias = (drawn(channels, device=device, seed=seed) for seed in (2, 3, 4))
    var, count = drawn(channels, device=device, seed=5).abs() + 0.5, torch.tensor(3, device=device)
    norm = NormParams(scale, bias, mean * 0.1 + 0.2, var, count, views=views, momentum=MOMENTUM, eps=EPS)
    return x.contiguous(memory_format=torch.channels_last), weight, norm


def running(norm: NormParams) -> tuple[Tensor, ...]:
    assert norm.num_batches_tracked is not None
    return norm.running_mean, norm.running_var, norm.num_batches_tracked


def in_float64(norm: NormParams) -> NormParams:
    copied = copy.deepcopy(norm)
    return copied._replace(**{k: v.double() for k, v in copied._asdict().items() if torch.is_tensor(v) and v.ndim})


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_are_conv2ds_and_statistics_batch_norms_of_them(
    device: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, weight, norm = drawn_case(shape, device, dtype)
    theirs, wide = copy.deepcopy(norm), in_float64(norm)
    y, statistics = pointwise_statistics(x, weight, norm)
    expected, of_exact = reference.pointwise_statistics(x.double(), weight.double(), wide)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.double(), expected, rtol=HALF_ULPS.get(dtype, 0.0), atol=FLOAT32_BATCHNORM)
    of_rounded = batch_statistics(y, theirs)
    torch.testing.assert_close(statistics, of_rounded, rtol=FLOAT32_BATCHNORM, atol=FLOAT32_BATCHNORM)
    for ours, other in zip(running(norm), running(theirs), strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=FLOAT32_BATCHNORM)
    if dtype == torch.float32:
        torch.testing.assert_close(statistics.double(), of_exact, rtol=10 * FLOAT32_BATCHNORM, atol=FLOAT32_BATCHNORM)
        for ours, exact in zip(running(norm), running(wide), strict=True):
            torch.testing.assert_close(ours.double(), exact.double(), rtol=0, atol=FLOAT32_BATCHNORM)


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("inputs", [64, 200])  # one block of inputs, and several
@pytest.mark.parametrize("tiles", pointwise.CHOICES, ids=str)
def test_every_choice_of_tiles_gives_the_same(
    device: str, tiles: Tiles, inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pointwise, "MULTIPROCESSORS", 1)  # a program sums several blocks of rows
    x, weight, norm = drawn_case((2, 1, inputs, 27, 21, 136), device, torch.float16)
    theirs = copy.deepcopy(norm)
    y, statistics = pointwise_statistics(x, weight, norm, tiles=tiles)
    expected = F.conv2d(x.double(), weight.double())
    torch.testing.assert_close(y.double(), expected, rtol=HALF_ULPS[torch.float16], atol=FLOAT32_BATCHNORM)
    of_rounded = batch_statistics(y, theirs)
    torch.testing.assert_close(statistics, of_rounded, rtol=FLOAT32_BATCHNORM, atol=FLOAT32_BATCHNORM)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, of the NaN put in
def test_views_do_not_mix(device: str) -> None:
    x, weight, norm = drawn_case((2, 1, 8, 3, 3, 8), device)
    x[1] = torch.nan
    y, statistics = pointwise_statistics(x, weight, norm)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
    assert statistics[:, 0].isfinite().all()
    assert statistics[:, 1].isnan().all()


@pytest.mark.parametrize("has_residual", [False, True])
def test_gradients_are_those_of_convolution_and_batch_norm(device: str, has_residual: bool) -> None:
    x, weight, norm = drawn_case((2, 2, 16, 5, 3, 24), device)
    shape = (4, 24, 5, 3)
    residual, dz = (drawn(*shape, device=device, seed=seed) for seed in (6, 7))
    results = []
    for dtype, is_ours in ((torch.float32, True), (torch.float64, False)):
        params = copy.deepcopy(norm) if is_ours else in_float64(norm)
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, weight, norm.weight, norm.bias)]
        params = params._replace(weight=leaves[2], bias=leaves[3])
        if is_ours:
            y, statistics = pointwise_statistics(leaves[0], leaves[1], params)
            given = {"statistics": statistics}
        else:
            y, given = F.conv2d(leaves[0], leaves[1]), {}
        if has_residual:
            z, _ = (batch_norm_add_relu if is_ours else reference.batch_norm_add_relu)(
                y, residual.to(dtype), params, **given
            )
        else:
            z = (batch_norm_act if is_ours else reference.batch_norm_act)(y, params, relu=True, **given)
        z.backward(dz.to(dtype))
        results.append([z.detach(), *(leaf.grad for leaf in leaves), *running(params)])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact.double(), rtol=FLOAT32_NETWORK, atol=10 * FLOAT32_BATCHNORM)


def test_unneeded_gradients_are_not_computed(device: str) -> None:
    x, weight, norm = drawn_case((2, 2, 8, 3, 3, 8), device)
    y, statistics = pointwise_statistics(x, weight.requires_grad_(), norm)
    assert y.requires_grad
    assert not statistics.requires_grad
    y.sum().backward()
    torch.testing.assert_close(weight.grad, x.sum((0, 2, 3)).expand(8, 8)[:, :, None, None], rtol=0, atol=1e-4)


@pytest.fixture
def group(device: str) -> Iterator[dist.ProcessGroup]:
    """A process group of this process alone."""
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_group_of_one_changes_nothing(device: str, group: dist.ProcessGroup) -> None:
    x, weight, norm = drawn_case((2, 1, 8, 3, 3, 8), device)
    shared, wide = copy.deepcopy(norm)._replace(group=group), in_float64(norm)._replace(group=group)
    expected = pointwise_statistics(x, weight, norm)
    for ours, theirs in zip(pointwise_statistics(x, weight, shared), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=FLOAT32_BATCHNORM)
    _, exact = reference.pointwise_statistics(x.double(), weight.double(), wide)
    torch.testing.assert_close(expected[1].double(), exact, rtol=10 * FLOAT32_BATCHNORM, atol=FLOAT32_BATCHNORM)


def test_channels_that_the_copies_cannot_take_are_refused(device: str) -> None:
    x, weight, norm = drawn_case((1, 2, 8, 3, 3, 10), device)
    with pytest.raises(ValueError, match="multiples of 4, or use conv2d"):
        pointwise_statistics(x, weight, norm)


def test_a_weight_of_other_channels_is_refused(device: str) -> None:
    x, weight, norm = drawn_case((1, 2, 8, 3, 3, 16), device)
    for convolution in (pointwise_statistics, reference.pointwise_statistics):
        with pytest.raises(ValueError, match=r"got x \[2, 8, 3, 3\] and a weight \[8, 8, 1, 1\]; give"):
            convolution(x, weight[:8], norm)


def small_network(device: str, *, joins: bool) -> ResNet:
    encoder = build(EncoderConfig("resnet50", width=1 / 8, stem="cifar"), seed=0).to(device)
    join_convolutions_(encoder, joins)
    return encoder


@pytest.fixture
def three_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make of a ResNet-50 three blocks, the last one strided."""
    monkeypatch.setitem(ARCHS, "resnet50", (Bottleneck, (2, 1)))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU leaves float32 to cuDNN")
@pytest.mark.usefixtures("short_splits", "three_blocks")
def test_a_network_with_joined_convolutions_is_the_same_network(device: str, launches: list[str]) -> None:
    images = drawn(4, 3, 8, 8, device=device).contiguous(memory_format=torch.channels_last)
    ours, today = (small_network(device, joins=joins) for joins in (True, False))
    wide = copy.deepcopy(today).double()
    ours(images).square().sum().backward()
    assert launches.count("pointwise_kernel") == 3 * 2 + 1  # and one shortcut, the other being strided
    joined = launches.count("stats_kernel")
    launches.clear()
    today(images).square().sum().backward()
    assert "pointwise_kernel" not in launches
    assert launches.count("stats_kernel") == joined + 3 * 2 + 1
    wide(images.double()).square().sum().backward()
    for (name, p), exact in zip(ours.named_parameters(), wide.parameters(), strict=True):
        assert p.grad is not None
        assert exact.grad is not None
        assert (p.grad - exact.grad).norm() <= FLOAT32_NETWORK * exact.grad.norm(), name
    for (name, buffer), exact in zip(ours.named_buffers(), wide.buffers(), strict=True):
        torch.testing.assert_close(buffer.double(), exact.double(), rtol=0, atol=FLOAT32_NETWORK, msg=name)
    launches.clear()
    ours.eval()(images)
    assert "pointwise_kernel" not in launches


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU leaves float32 to cuDNN")
@pytest.mark.usefixtures("short_splits", "three_blocks")
def test_recomputed_inputs_of_joined_convolutions_give_the_same_bits(device: str) -> None:
    images = drawn(4, 3, 8, 8, device=device).contiguous(memory_format=torch.channels_last)
    kept, grads = [], []
    for recomputes in (False, True):
        encoder = small_network(device, joins=True)
        encoder.set_recompute(recomputes)
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            encoder(images).square().sum().backward()
        kept.append(sum(t.nbytes for t in saved))
        grads.append([p.grad for p in encoder.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    assert kept[1] < kept[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks a GPU's driver")
def test_a_captured_convolution_is_the_convolution() -> None:
    x, weight, norm = drawn_case((2, 2, 64, 9, 9, 128), "cuda", torch.bfloat16)
    theirs = copy.deepcopy(norm)
    expected = pointwise_statistics(x, weight, theirs)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = pointwise_statistics(x, weight, norm)
    graph.replay()
    for ours, wanted in zip((*results, *running(norm)), (*expected, *running(theirs)), strict=True):
        assert torch.equal(ours, wanted)
