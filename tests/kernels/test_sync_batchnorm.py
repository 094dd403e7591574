"""Laws of the batch-norm kernels over ranks: two processes are one process on the joined batch."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastbyol.batchnorm import (
    BatchNormAct2d,
    enter_convolutions_,
    normalize_and_convolve,
    sum_with_gradients_,
    synchronize_,
)
from tests.support.ranks import VIEWS, check_ranks_equal_one_process, join, run
from tests.support.tolerances import FLOAT32_BATCHNORM


@pytest.mark.skipif(torch.cuda.is_available(), reason="two interpreters on the CPU; a GPU has its own tests")
def test_two_ranks_of_unequal_size_equal_one_process(tmp_path: Path) -> None:
    check_ranks_equal_one_process(tmp_path, (3, 1), dtype=torch.float32, atol=10 * FLOAT32_BATCHNORM)


def fused(layers: nn.ModuleList, x: Tensor, dz: Tensor) -> dict[str, Tensor]:
    """Run a norm, the 1x1 convolution that computes it, and the norm after; collect everything."""
    norm, convolution, after = layers
    x = x.clone().requires_grad_()
    z = after(*normalize_and_convolve(norm, x, convolution, after))
    z.backward(dz)
    assert x.grad is not None
    gradients = {f"{name}.grad": p.grad for name, p in layers.named_parameters() if p.grad is not None}
    return {"z": z.detach(), "dx": x.grad, **gradients, **dict(layers.named_buffers())}


def fused_of_rank(rank: int, folder: Path) -> dict[str, Tensor]:
    layers, x, dz = torch.load(folder / "inputs.pt", weights_only=False)[rank]
    synchronize_(layers, dist.group.WORLD)
    enter_convolutions_(layers, True)
    sum_with_gradients_(layers, True)
    return fused(layers, x, dz)


@pytest.mark.skipif(torch.cuda.is_available(), reason="two interpreters on the CPU; a GPU has its own tests")
def test_two_ranks_share_the_statistics_of_a_norm_within_its_convolution(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList(
        [BatchNormAct2d(8, views=VIEWS), nn.Conv2d(8, 16, 1, bias=False), BatchNormAct2d(16, views=VIEWS)]
    )
    given = [
        (copy.deepcopy(layers), *((1 + rank) * torch.randn(VIEWS * images, channels, 2, 3) for channels in (8, 16)))
        for rank, images in enumerate((3, 1))
    ]
    torch.save(given, tmp_path / "inputs.pt")
    got = run(fused_of_rank, tmp_path, ranks=2)
    joined = (join([rank[index].double() for rank in given]) for index in (1, 2))
    for name, want in fused(layers.double(), *joined).items():
        is_own = name in ("z", "dx")
        found = [rank[name] for rank in got]
        actual = join(found) if is_own else sum(found) if name.endswith("grad") else found[0]
        torch.testing.assert_close(actual.to(want.dtype), want, rtol=1e-4, atol=10 * FLOAT32_BATCHNORM, msg=name)
