"""One training step, from views to EMA, and three engines that run it: eager, CUDA graph, torch.compile."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastbyol.config import Recipe
from fastbyol.errors import ConfigError
from fastbyol.model.byol import BYOL, Output
from fastbyol.model.parts import Optimizer

Views = tuple[Tensor, ...]  # of a batch or a part of it, the arguments of BYOL.forward: global, then local if any
WARM_UP = 3  # eager steps before a capture, in which cuDNN chooses algorithms and LARS allocates momenta
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Eager:
    """The engine that runs each operation as it comes, and the base of the others.

    precision: dtype in which convolutions and linear layers compute (autocast); parameters, statistics, loss and
    optimiser stay float32. lagged_target: the loss moves the target; the optimiser must then have no targets.
    """

    def __init__(
        self, model: BYOL, optimizer: Optimizer, *, precision: torch.dtype = torch.float32, lagged_target: bool = False
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.precision, self.lagged_target = precision, lagged_target
        self.forward: Callable[..., Output] = model

    def __call__(self, *views: Tensor, lr: float, tau: float) -> Output:
        """Take one step on views [V*B, 3, H, W], view-major: update online, momenta, running statistics and target.

        Local views [L*B, 3, h, w] may follow, see BYOL.forward. Returns the detached loss from before the update, valid
        until the next step. No host sync.
        """
        self.optimizer.set_rates(lr=lr, tau=tau)
        return self._step(*views)

    def accumulate(self, parts: Iterable[Views], *, count: int, lr: float, tau: float) -> Output:
        """Take one step on a batch in `count` equal micro-batches, each [V*B/count, 3, H, W]: one update, one EMA.

        Local views follow in each, if there are any. Each micro-batch is a population of its own for batch norm.
        Returns the mean loss and the last micro-batch's projections. Not for a lagged target, which would move with
        every forward.
        """
        self.optimizer.set_rates(lr=lr, tau=tau)
        self.optimizer.zero_grad()
        losses, representations = [], []
        for number, views in enumerate(parts, start=1):
            is_last = number == count
            with (
                nullcontext()
                if is_last or not isinstance(self.forward, DistributedDataParallel)
                else (self.forward.no_sync())
            ):
                output = self._backward(*views, weight=1 / count)
            losses.append(output.loss.detach())
            representations.append(output.representations)
        self._update()
        return output._replace(loss=torch.stack(losses).mean(), representations=torch.cat(representations))

    def release(self) -> None:
        """Free the memory that only further steps would need."""

    def _step(self, *views: Tensor) -> Output:
        """Run the part of a step that a graph can hold: all but setting the rates, which are on the device."""
        self.optimizer.zero_grad()
        output = self._backward(*views)
        self._update()
        return output._replace(loss=output.loss.detach())

    def _backward(self, *views: Tensor, weight: float = 1.0) -> Output:
        """Add the gradients of `weight` times the loss."""
        with self.autocast():
            output = self.forward(*views, tau=self.optimizer.tau if self.lagged_target else None)
        (output.loss if weight == 1.0 else output.loss * weight).backward()  # type: ignore[no-untyped-call]
        return output

    def autocast(self) -> torch.autocast:
        """Return the autocast context of the engine's precision."""
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, self.precision, enabled=self.precision == torch.bfloat16)

    def _update(self) -> None:
        """Update parameters, targets and the target's running statistics."""
        self.optimizer.step()
        if self.model.target_statistics == "running":
            self.model.update_target_statistics(self.optimizer.tau)

    def distribute(self, group: dist.ProcessGroup) -> None:
        """Train one model on all ranks of a group, with averaged gradients and shared statistics and negatives.

        All ranks must start with equal weights, as equal seeds give.
        """
        self.model.synchronize_(group)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames broadcast_buffers, unlike 2.10
            # no broadcast_buffers: shared statistics already keep the buffers equal
            assert isinstance(self.forward, nn.Module)  # the model or its torch.compile
            self.forward = DistributedDataParallel(self.forward, process_group=group, broadcast_buffers=False)


@dataclass(frozen=True)
class CapturedWork:
    """Work captured in a CUDA graph: `replay` reads `views` and writes `output`."""

    replay: Callable[[], None]
    views: Views
    output: Output


class Graph(Eager):
    """The engine that replays a step, or each of its micro-batches, as one CUDA graph.

    The first WARM_UP steps of each size of views run eagerly; they are real training steps, nothing is thrown away. A
    graph holds addresses: load a state into model and optimiser before the first step, not after. Only one graph is
    held at a time, since it keeps the memory of a whole step: another size of views, as along a crop ramp, starts anew.
    """

    def __init__(
        self, model: BYOL, optimizer: Optimizer, *, precision: torch.dtype = torch.float32, lagged_target: bool = False
    ) -> None:
        super().__init__(model, optimizer, precision=precision, lagged_target=lagged_target)
        self._shape: tuple[int, list[torch.Size]] | None = None  # number of micro-batches, shapes of views
        self._warm_ups = 0
        self._captured: CapturedWork | None = None
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, *views: Tensor, lr: float, tau: float) -> Output:
        """Take one step; see Eager."""
        self.optimizer.set_rates(lr=lr, tau=tau)
        if self._is_warm_up(1, views):
            with self._on_capture_stream():
                return self._step(*views)
        if self._captured is None:
            self.optimizer.zero_grad()  # or the last warm-up's gradients would stay beside the graph's
        return self._replay(views, self._step)

    def accumulate(self, parts: Iterable[Views], *, count: int, lr: float, tau: float) -> Output:
        """Take one step on `count` micro-batches, one replay each; see Eager. Gradients keep their addresses."""
        self.optimizer.set_rates(lr=lr, tau=tau)
        rest = iter(parts)
        first = next(rest)
        if self._is_warm_up(count, first):
            with self._on_capture_stream():
                return super().accumulate(chain([first], rest), count=count, lr=lr, tau=tau)
        torch._foreach_zero_([p.grad for p in self.model.parameters() if p.grad is not None])
        losses, representations = [], []
        for views in chain([first], rest):
            output = self._replay(views, partial(self._micro_batch, weight=1 / count))
            losses.append(output.loss.clone())  # the next replay overwrites them
            representations.append(output.representations.clone())
        self._update()
        return output._replace(loss=torch.stack(losses).mean(), representations=torch.cat(representations))

    def _is_warm_up(self, parts: int, views: Views) -> bool:
        """Tell whether the next step runs eagerly; release the graph of other shapes first."""
        shape = (parts, [each.shape for each in views])
        if self._shape != shape:
            self._shape, self._warm_ups = shape, 0
            self.release()
        self._warm_ups += 1
        return self._warm_ups <= WARM_UP

    def release(self) -> None:
        """Free the graph and its memory, gradients included."""
        if self._captured is not None:
            self._captured = None
            self.optimizer.zero_grad()
            self._free_memory()

    def _micro_batch(self, *views: Tensor, weight: float) -> Output:
        """Run the work that a micro-batch's graph holds; the output keeps no autograd graph alive."""
        output = self._backward(*views, weight=weight)
        return output._replace(loss=output.loss.detach())

    def _replay(self, views: Views, work: Callable[..., Output]) -> Output:
        if self._captured is None:
            self._captured = self._capture(views, work)
        captured = self._captured
        for static, given in zip(captured.views, views, strict=True):
            static.copy_(given)  # 0.3 GB at 224 px and 512 images, of some 500 GB that the step moves (computed)
        captured.replay()
        return captured.output

    @contextmanager
    def _on_capture_stream(self) -> Iterator[None]:
        """Run the with-block on the stream of the capture, since autograd nodes remember their stream."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def _free_memory(self) -> None:
        """Free the memory that no tensor uses (host sync, once per size)."""
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()

    def _capture(self, views: Views, work: Callable[..., Output]) -> CapturedWork:
        """Capture work in a graph without running it (host sync, once per size)."""
        static, graph = tuple(map(torch.empty_like, views)), torch.cuda.CUDAGraph()
        self._free_memory()  # of the warm-ups; memory freed during a capture would record events into the graph
        # thread_local: the loader's threads may pin memory during the capture
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            output = work(*static)
        return CapturedWork(graph.replay, static, output)


class Compiled(Eager):
    """The engine in which torch.compile fuses forward, loss and backward from the reference operations, not LARS."""

    def __init__(
        self,
        model: BYOL,
        optimizer: Optimizer,
        *,
        precision: torch.dtype = torch.float32,
        lagged_target: bool = False,
        backend: str = "inductor",
    ) -> None:
        super().__init__(model, optimizer, precision=precision, lagged_target=lagged_target)
        self.forward = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)


ENGINES: dict[str, type[Eager]] = {"eager": Eager, "graph": Graph, "compile": Compiled}


def random_views(recipe: Recipe, *, images: int, device: str | torch.device) -> Views:
    """Return views of this many random images, as an engine takes them: a tensor for each size of views.

    Each is float32 [views * images, channels, px, px] from 0 to 1, in channels-last memory.
    """
    return tuple(
        torch.rand(count * images, recipe.encoder.channels, px, px, device=device).contiguous(
            memory_format=torch.channels_last
        )
        for count, px in recipe.sizes_of_views(recipe.crop_px)
    )


def engine(
    name: str, model: BYOL, optimizer: Optimizer, *, precision: str = "float32", lagged_target: bool = False
) -> Eager:
    """Build an engine of ENGINES in a precision of PRECISIONS.

    Raises ConfigError for an unknown name, for graph or compile without a GPU, and for an optimiser or a loss that a
    CUDA graph cannot capture.
    """
    for setting, value, known in (("engine", name, ENGINES), ("precision", precision, PRECISIONS)):
        if value not in known:
            raise ConfigError(f"{setting} is {value!r}; give one of {', '.join(known)}")
    if name == "graph" and not optimizer.is_capturable:
        raise ConfigError(
            f"engine graph with optimizer {type(optimizer).__name__}, which reads values on the host, as a CUDA graph "
            "cannot; give --engine eager"
        )
    if name == "graph" and not getattr(model.objective, "is_capturable", True):
        raise ConfigError(
            f"engine graph with the loss {type(model.objective).__name__}, which a CUDA graph cannot hold; give "
            "--engine eager"
        )
    if name != "eager" and not next(model.parameters()).is_cuda:
        raise ConfigError(f"engine {name} needs a GPU, and this run is on the CPU; leave --engine out")
    return ENGINES[name](model, optimizer, precision=PRECISIONS[precision], lagged_target=lagged_target)
