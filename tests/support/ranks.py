"""Functions run as several ranks on the CPU, and the check that ranks with shared statistics equal one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastbyol.model.batchnorm import BatchNormAct2d, BatchNormAddReLU2d, normalize_and_pool, synchronize_
from tests.support.commands import PATIENCE_S
from tests.support.forks import CONTEXT

VIEWS = 2


def run(rank_main: Callable[[int, Path], Any], folder: Path, *, ranks: int) -> list[Any]:
    """Call rank_main(rank, folder) in processes that form a gloo group; return the results in order of rank."""
    processes = [CONTEXT.Process(target=_enter, args=(rank_main, rank, ranks, folder)) for rank in range(ranks)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(PATIENCE_S)
        assert [process.exitcode for process in processes] == [0] * ranks
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def _enter(rank_main: Callable[[int, Path], Any], rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    rendezvous, timeout = f"file://{folder / 'rendezvous'}", timedelta(seconds=PATIENCE_S)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=ranks, timeout=timeout)
    torch.save(rank_main(rank, folder), folder / f"{rank}.pt")
    dist.destroy_process_group()


class Inputs(NamedTuple):
    """Images and gradient of a rank, [V*B, C, H, W], view-major, and the layers that all ranks start from."""

    layers: nn.ModuleList
    x: Tensor
    dz: Tensor


def join(parts: list[Tensor]) -> Tensor:
    """Join the ranks' [V*B, ...], view by view."""
    return torch.cat([view for views in zip(*(part.chunk(VIEWS) for part in parts), strict=True) for view in views])


def step(inputs: Inputs) -> dict[str, Tensor]:
    """Run a batch norm, one whose residual is the first one's result, and one with pooling; collect everything."""
    first, last, pooling = inputs.layers
    x = inputs.x.clone().requires_grad_()
    shortcut = first(x)
    z, _ = last(x.square(), shortcut)
    pooled = normalize_and_pool(pooling, x.contiguous(memory_format=torch.channels_last))[0]
    height, width = pooled.shape[2:]
    torch.autograd.backward((z, pooled), (inputs.dz, inputs.dz[:, :, :height, :width]))
    gradients = {f"{name}.grad": p.grad for name, p in inputs.layers.named_parameters()}
    results = {"z": z.detach(), "pooled": pooled.detach(), "dx": x.grad}
    return {**results, **gradients, **dict(inputs.layers.named_buffers())}


def synchronized_step(rank: int, folder: Path) -> dict[str, Tensor]:
    """Take the step of a rank, and count its all-reduces."""
    inputs: Inputs = torch.load(folder / "inputs.pt", weights_only=False)[rank]
    synchronize_(inputs.layers, dist.group.WORLD)
    calls, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: calls.append(1) or all_reduce(*args, **kwargs)
    return {**step(inputs), "all_reduces": torch.tensor(len(calls))}


def check_ranks_equal_one_process(folder: Path, images: tuple[int, ...], *, dtype: torch.dtype, atol: float) -> None:
    """Compare ranks of so many images a view with one process, in float64, on the joined batch."""
    torch.manual_seed(0)
    channels = 5
    norms = (BatchNormAct2d, BatchNormAddReLU2d, BatchNormAct2d)
    layers = nn.ModuleList([norm(channels, views=VIEWS) for norm in norms])
    for layer in layers:
        for tensor in (layer.weight, layer.bias, layer.running_mean):
            nn.init.normal_(tensor)
    shapes = [(VIEWS * count, channels, 2, 3) for count in images]
    inputs = [
        Inputs(copy.deepcopy(layers).to(dtype), torch.randn(shape).to(dtype) * (1 + rank), torch.randn(shape).to(dtype))
        for rank, shape in enumerate(shapes)
    ]
    torch.save(inputs, folder / "inputs.pt")
    got = run(synchronized_step, folder, ranks=len(images))
    joined = (join([getattr(rank, name).double() for rank in inputs]) for name in ("x", "dz"))
    expected = step(Inputs(layers.double(), *joined))
    for name, want in expected.items():
        if name.endswith("grad"):
            actual = sum(rank[name] for rank in got)
        elif name in ("z", "pooled", "dx"):
            actual = join([rank[name] for rank in got])
        else:
            assert all(torch.equal(rank[name], got[0][name]) for rank in got), name
            actual = got[0][name]
        torch.testing.assert_close(actual.to(want.dtype), want, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    assert all(rank["all_reduces"] == 2 * len(layers) for rank in got)
