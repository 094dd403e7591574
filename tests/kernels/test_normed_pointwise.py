"""Laws of batch norm and ReLU within a 1x1 convolution: values and gradients are those of the three apart."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastbyol.batchnorm import enter_convolutions_, sum_with_gradients_
from fastbyol.config import EncoderConfig
from fastbyol.encoder import ResNet, build
from fastbyol.kernels import pointwise, pointwise_prologue, reference
from fastbyol.kernels.batchnorm import apply_norm, backward_sums, batch_norm_act
from fastbyol.kernels.batchnorm_statistics import batch_statistics, reduce_splits
from fastbyol.kernels.normed_pointwise import Fusion, normed_pointwise
from fastbyol.kernels.pointwise import Tiles, flat, pointwise_statistics, unflat
from fastbyol.kernels.pointwise_epilogue import TILES, masked_gradient
from fastbyol.kernels.pointwise_prologue import normed_weight_gradient
from fastbyol.kernels.reference import NormParams
from tests.support.tolerances import FLOAT32_BATCHNORM, FLOAT32_NETWORK, HALF_ULPS

pytestmark = pytest.mark.usefixtures("poisoned", "short_splits")
PROLOGUE, EPILOGUE = Fusion(in_prologue=True, in_epilogue=False), Fusion(in_prologue=False, in_epilogue=True)
BOTH = Fusion(in_prologue=True, in_epilogue=True)
APART = Fusion(in_prologue=False, in_epilogue=False)
FUSIONS = [PROLOGUE, EPILOGUE, EPILOGUE._replace(recomputes=True), BOTH]
# the interpreter multiplies the bits of bfloat16 as integers
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
SHAPES = [  # views, images a view, K, H, W, N
    (1, 9, 8, 1, 1, 8),
    (3, 1, 8, 7, 1, 16),  # blocks across the views' ends
    (2, 3, 16, 7, 5, 24),
    (2, 1, 72, 17, 9, 136),  # several blocks of rows, inputs and columns, none of them full
    (1, 2, 64, 16, 16, 64),  # full ones
]
WIDE_SHAPE = (2, 1, 136, 11, 9, 264)  # several blocks of inputs and of columns of the largest tiles


def drawn(*shape: int, device: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def drawn_norm(channels: int, device: str, *, views: int, seed: int) -> NormParams:
    """Draw a batch norm, half of whose channels ReLU lets mostly through, and whose running mean is none's."""
    mean, scale, bias = (drawn(channels, device=device, seed=seed + i) for i in range(3))
    var, count = drawn(channels, device=device, seed=seed + 3).abs() + 0.5, torch.tensor(3, device=device)
    return NormParams(scale, bias, mean * 0.1 + 0.2, var, count, views=views, momentum=0.1, eps=1e-5)


def drawn_case(
    shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, NormParams, Tensor, NormParams]:
    """Draw x, the batch norm before, the weight, and the batch norm after."""
    views, images, inputs, height, width, channels = shape
    x = drawn(views * images, inputs, height, width, device=device, dtype=dtype) + 0.5
    weight = drawn(channels, inputs, 1, 1, device=device, seed=1, dtype=dtype) / inputs**0.5
    norm, after = (drawn_norm(c, device, views=views, seed=seed) for c, seed in ((inputs, 2), (channels, 6)))
    return x.contiguous(memory_format=torch.channels_last), norm, weight, after


def running(*norms: NormParams) -> list[Tensor]:
    return [x for norm in norms for x in (norm.running_mean, norm.running_var, norm.num_batches_tracked)]


def in_float64(norm: NormParams) -> NormParams:
    copied = copy.deepcopy(norm)
    return copied._replace(**{k: v.double() for k, v in copied._asdict().items() if torch.is_tensor(v) and v.ndim})


def outcome(
    shape: tuple[int, ...], device: str, fusion: Fusion | None, *, dead: bool = False, group: object = None
) -> list[Tensor]:
    """Return values, statistics, all gradients and running statistics; fusion: None for the reference in float64."""
    x, norm, weight, after = drawn_case(shape, device)
    if dead:  # every ReLU off in one channel, and on in another
        norm.weight[:2], norm.bias[0], norm.bias[1] = 0.5, -5.0, 5.0
    wide = torch.float32 if fusion is not None else torch.float64
    if fusion is None:
        norm, after = in_float64(norm), in_float64(after)
    leaves = [t.to(wide, copy=True).requires_grad_() for t in (x, norm.weight, norm.bias, weight, after.weight)]
    norm = norm._replace(weight=leaves[1], bias=leaves[2], group=group)
    after = after._replace(weight=leaves[4], group=group)
    if fusion is None:
        y = F.conv2d(reference.batch_norm_act(leaves[0], norm, relu=True), leaves[3])
        z = reference.batch_norm_act(y, after, relu=True)
    else:
        y, statistics = normed_pointwise(leaves[0], norm, leaves[3], after, fusion)
        assert y.is_contiguous(memory_format=torch.channels_last)
        z = batch_norm_act(y, after, relu=True, statistics=statistics)
    z.backward(drawn(*z.shape, device=device, seed=11).to(wide))
    return [y.detach(), z.detach(), *(leaf.grad for leaf in leaves), *running(norm, after)]


@pytest.mark.parametrize("fusion", [PROLOGUE, EPILOGUE, BOTH], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_norm_and_convolution(
    device: str, shape: tuple[int, ...], fusion: Fusion
) -> None:
    for ours, exact in zip(outcome(shape, device, fusion), outcome(shape, device, None), strict=True):
        torch.testing.assert_close(ours.double(), exact.double(), rtol=FLOAT32_NETWORK, atol=20 * FLOAT32_BATCHNORM)


@pytest.mark.parametrize("fusion", FUSIONS, ids=str)
def test_channels_that_relu_passes_or_stops_as_a_whole_are_right(device: str, fusion: Fusion) -> None:
    ours, exact = (outcome(SHAPES[2], device, form, dead=True) for form in (fusion, None))
    dx = ours[2]
    assert (dx[:, 0] == 0).all()  # no gradient passes
    assert (dx[:, 1] != 0).all()
    for found, wanted in zip(ours, exact, strict=True):
        torch.testing.assert_close(found.double(), wanted.double(), rtol=FLOAT32_NETWORK, atol=20 * FLOAT32_BATCHNORM)


@pytest.mark.parametrize("shape", [SHAPES[1], WIDE_SHAPE], ids=str)
def test_a_prologue_gives_the_bits_of_the_normalised_input(device: str, shape: tuple[int, ...]) -> None:
    x, norm, weight, after = drawn_case(shape, device, HALF)
    apart = copy.deepcopy((norm, after))
    ours = normed_pointwise(x, norm, weight, after, PROLOGUE)
    z = batch_norm_act(x, apart[0], relu=True)
    theirs = pointwise_statistics(z, weight, apart[1], tiles=pointwise.NARROW)
    for found, wanted in zip((*ours, *running(norm, after)), (*theirs, *running(*apart)), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("tiles", pointwise_prologue.GRADIENT_CHOICES, ids=str)
def test_every_choice_of_tiles_gives_the_weights_gradient(
    device: str, tiles: Tiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pointwise, "MULTIPROCESSORS", 3)  # a program sums several blocks of rows
    x, norm, weight, _ = drawn_case(WIDE_SHAPE, device, HALF)
    dy = drawn(len(x), len(weight), *x.shape[2:], device=device, seed=12, dtype=HALF)
    statistics = batch_statistics(x, norm)
    z, _ = apply_norm(x, None, *statistics, norm.weight, norm.bias, relu=True)
    found = normed_weight_gradient(flat(dy), flat(x), statistics, (norm.weight, norm.bias), tiles=tiles)
    exact = flat(dy).double().t() @ flat(z).double()
    torch.testing.assert_close(found.double(), exact, rtol=HALF_ULPS[HALF], atol=1e-4)


def test_an_epilogue_gives_the_gradient_and_the_sums_of_it(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise, "MULTIPROCESSORS", 3)
    x, norm, weight, _ = drawn_case(WIDE_SHAPE, device, HALF)
    dy = drawn(len(x), len(weight), *x.shape[2:], device=device, seed=12, dtype=HALF)
    statistics, pair = batch_statistics(x, norm), (norm.weight, norm.bias)
    rows, partial = masked_gradient(flat(dy), weight.flatten(1), flat(x), statistics, pair, tiles=TILES)
    z, _ = apply_norm(x, None, *statistics, *pair, relu=True)
    exact = (flat(dy).double() @ weight.flatten(1).double()) * (flat(z) > 0)
    torch.testing.assert_close(rows.double(), exact, rtol=HALF_ULPS[HALF], atol=1e-4)
    assert (rows[flat(z) == 0] == 0).all()
    of_rounded = backward_sums(unflat(rows, x), None, x, None, None, statistics, *pair, relu=False)
    ours, theirs = (reduce_splits(each, len(rows) // 2, totals=None, group=None) for each in (partial, of_rounded))
    torch.testing.assert_close(ours, theirs, rtol=FLOAT32_BATCHNORM, atol=1e-3)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, of the NaN put in
@pytest.mark.parametrize("fusion", [PROLOGUE, EPILOGUE], ids=str)
def test_views_do_not_mix(device: str, fusion: Fusion) -> None:
    x, norm, weight, after = drawn_case((2, 1, 8, 3, 3, 8), device)
    x[1] = torch.nan
    y, statistics = normed_pointwise(x.requires_grad_(), norm, weight, after, fusion)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
    assert statistics[:, 0].isfinite().all()
    assert statistics[:, 1].isnan().all()
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    assert x.grad[0].isfinite().all()
    assert x.grad[1].isnan().all()


@pytest.mark.parametrize("fusion", [PROLOGUE, EPILOGUE], ids=str)
def test_unneeded_gradients_are_not_computed(device: str, fusion: Fusion, launches: list[str]) -> None:
    x, norm, weight, after = drawn_case((2, 2, 8, 3, 3, 8), device)
    y, statistics = normed_pointwise(x, norm, weight.requires_grad_(), after, fusion)
    assert not statistics.requires_grad
    launches.clear()
    y.sum().backward()
    z = batch_norm_act(x, norm, relu=True)
    torch.testing.assert_close(weight.grad, z.sum((0, 2, 3)).expand(8, 8)[:, :, None, None], rtol=0, atol=1e-4)
    assert not {"masked_gradient_kernel", "backward_sums_kernel", "backward_apply_kernel"} & set(launches)


def test_a_group_of_one_changes_nothing(device: str, group: dist.ProcessGroup) -> None:
    shared, alone = (outcome(SHAPES[2], device, BOTH, group=each) for each in (group, None))
    for ours, theirs in zip(shared, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=FLOAT32_BATCHNORM, atol=FLOAT32_BATCHNORM)


def test_channels_that_the_copies_cannot_take_are_refused(device: str) -> None:
    x, norm, weight, after = drawn_case((1, 2, 8, 3, 3, 10), device)
    with pytest.raises(ValueError, match="multiples of 4, or use conv2d"):
        normed_pointwise(x, norm, weight, after, PROLOGUE)


def test_a_weight_of_other_channels_is_refused(device: str) -> None:
    x, norm, weight, after = drawn_case((1, 2, 8, 3, 3, 16), device)
    with pytest.raises(ValueError, match=r"got x \[2, 8, 3, 3\] and a weight \[8, 8, 1, 1\]; give"):
        normed_pointwise(x, norm, weight[:8], after, PROLOGUE)


def small_network(device: str, fusion: Fusion) -> ResNet:
    encoder = build(EncoderConfig("resnet50", width=1 / 8, stem="cifar"), seed=0, views=2).to(device)
    enter_convolutions_(encoder, fusion.in_prologue)
    sum_with_gradients_(encoder, fusion.in_epilogue)
    encoder.set_recompute(fusion.recomputes)
    return encoder


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU leaves float32 to cuDNN")
@pytest.mark.usefixtures("three_blocks")
@pytest.mark.parametrize("fusion", FUSIONS, ids=str)
def test_a_network_with_fused_convolutions_is_the_same_network(
    device: str, fusion: Fusion, launches: list[str]
) -> None:
    images = drawn(4, 3, 8, 8, device=device)
    ours = small_network(device, fusion)
    wide = small_network(device, APART).double()
    ours(images).square().sum().backward()
    assert launches.count("normed_pointwise_kernel") == 3 * fusion.in_prologue
    assert launches.count("normed_weight_gradient_kernel") == 3 * fusion.in_prologue
    assert launches.count("masked_gradient_kernel") == 3 * fusion.in_epilogue
    wide(images.double()).square().sum().backward()
    for (name, p), exact in zip(ours.named_parameters(), wide.parameters(), strict=True):
        assert p.grad is not None
        assert exact.grad is not None
        assert (p.grad - exact.grad).norm() <= FLOAT32_NETWORK * exact.grad.norm(), name
    for (name, buffer), exact in zip(ours.named_buffers(), wide.buffers(), strict=True):
        torch.testing.assert_close(buffer.double(), exact.double(), rtol=0, atol=FLOAT32_NETWORK, msg=name)
    launches.clear()
    ours.eval()(images)
    assert not {"normed_pointwise_kernel", "masked_gradient_kernel"} & set(launches)


def test_a_prologue_keeps_less(device: str) -> None:
    x, norm, weight, after = drawn_case((2, 2, 64, 9, 9, 64), device)
    kept = {}
    for fusion in (APART, PROLOGUE):
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            normed_pointwise(x.requires_grad_(), norm, weight, after, fusion)
        kept[fusion.in_prologue] = sum(t.nbytes for t in saved)
    assert kept[False] - kept[True] == x.nbytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks a GPU's driver")
def test_a_captured_convolution_is_the_convolution() -> None:
    x, norm, weight, after = drawn_case((2, 2, 64, 9, 9, 128), "cuda", torch.bfloat16)
    apart = copy.deepcopy((norm, after))
    expected = normed_pointwise(x, apart[0], weight, apart[1], BOTH)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = normed_pointwise(x, norm, weight, after, BOTH)
    graph.replay()
    for ours, wanted in zip((*results, *running(norm, after)), (*expected, *running(*apart)), strict=True):
        assert torch.equal(ours, wanted)
