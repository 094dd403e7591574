"""Know one training step, from views to EMA, and the three engines that run it: eager, CUDA graph, torch.compile."""

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

from fastbyol import apex
from fastbyol.byol import BYOL, Output
from fastbyol.config import ConfigError
from fastbyol.optim import LARS

WARM_UP = 3  # eager steps before a capture: cuDNN chooses its algorithms, LARS allocates its momenta
Optimizer = LARS | apex.LARC
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Eager:
    """Run each operation as it comes.

    precision: the dtype convolutions and linear layers compute in (autocast); parameters, statistics, loss and
    optimiser stay float32. lagged_target: the loss moves the target, not the optimiser, which must have none.
    """

    def __init__(
        self, model: BYOL, optimizer: Optimizer, *, precision: torch.dtype = torch.float32, lagged_target: bool = False
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.precision, self.lagged_target = precision, lagged_target
        self.forward: Callable[..., Output] = model

    def __call__(self, views: Tensor, *, lr: float, tau: float) -> Output:
        """Take one step on views [2B, 3, H, W], view-major; move online, momenta, running statistics and target.

        No host sync. The loss returned is that before the step, detached; it is valid until the next step.
        """
        self.optimizer.set_rates(lr=lr, tau=tau)
        return self._step(views)

    def accumulate(self, parts: Iterable[Tensor], *, of: int, lr: float, tau: float) -> Output:
        """Take one step on a batch that comes in `of` equal parts, each [2B/of, 3, H, W]: one optimiser step, one EMA.

        Each part is a population of its own to batch norm. The loss returned is the mean of the parts', the projections
        are the last part's. A model whose target moves with the forward cannot be trained so.
        """
        self.optimizer.set_rates(lr=lr, tau=tau)
        self.optimizer.zero_grad()
        losses, seen = [], []
        for number, views in enumerate(parts, start=1):
            is_last = number == of
            with (
                nullcontext()
                if is_last or not isinstance(self.forward, DistributedDataParallel)
                else (self.forward.no_sync())
            ):
                output = self._backward(views, share=1 / of)
            losses.append(output.loss.detach())
            seen.append(output.representations)
        self._move()
        return output._replace(loss=torch.stack(losses).mean(), representations=torch.cat(seen))

    def release(self) -> None:
        """Give back the memory that only further steps would need."""

    def _step(self, views: Tensor) -> Output:
        """Do what a graph can hold: everything but setting the rates, which live on the device."""
        self.optimizer.zero_grad()
        output = self._backward(views)
        self._move()
        return output._replace(loss=output.loss.detach())

    def _backward(self, views: Tensor, *, share: float = 1.0) -> Output:
        """Add the gradients of `share` of the loss."""
        with self.autocast():
            output = self.forward(views, tau=self.optimizer.tau if self.lagged_target else None)
        (output.loss if share == 1.0 else output.loss * share).backward()  # type: ignore[no-untyped-call]
        return output

    def autocast(self) -> torch.autocast:
        """Give the context in which networks compute in the engine's precision."""
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, self.precision, enabled=self.precision == torch.bfloat16)

    def _move(self) -> None:
        """Let the optimiser move everything that follows the gradients."""
        self.optimizer.step()
        if self.model.target_statistics == "running":
            self.model.follow_statistics(self.optimizer.tau)

    def share(self, group: dist.ProcessGroup) -> None:
        """Let the ranks of a group train one model: they average gradients and share statistics and negatives.

        Every rank must hold equal weights, as equal seeds give them.
        """
        self.model.synchronize_(group)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames broadcast_buffers, 2.10 knows no other
            # buffers are equal already: batch norm has shared its statistics
            assert isinstance(self.forward, nn.Module)  # the model, or what torch.compile made of it
            self.forward = DistributedDataParallel(self.forward, process_group=group, broadcast_buffers=False)


@dataclass(frozen=True)
class Captured:
    """Hold captured work: `replay` reads `views` and writes `output`."""

    replay: Callable[[], None]
    views: Tensor
    output: Output


class Graph(Eager):
    """Replay a step as one CUDA graph, or the part of each micro-batch; the first WARM_UP steps of a size run eagerly.

    Every warm-up step is a step of the training: nothing is run to be thrown away. A graph holds addresses: load a
    state into model and optimiser before the first step, not after. One graph is held at a time, since its memory is
    a whole step's: views of another size, as after each rise of a crop ramp, begin anew.
    """

    def __init__(
        self, model: BYOL, optimizer: Optimizer, *, precision: torch.dtype = torch.float32, lagged_target: bool = False
    ) -> None:
        super().__init__(model, optimizer, precision=precision, lagged_target=lagged_target)
        self._kind: tuple[int, torch.Size] | None = None  # number of parts, shape of views
        self._warm_ups = 0
        self._captured: Captured | None = None
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, views: Tensor, *, lr: float, tau: float) -> Output:
        """Take one step; see Eager."""
        self.optimizer.set_rates(lr=lr, tau=tau)
        if self._is_warm_up(1, views.shape):
            with self._aside():
                return self._step(views)
        if self._captured is None:
            self.optimizer.zero_grad()  # or the last warm-up's gradients would lie beside the graph's
        return self._replayed(views, self._step)

    def accumulate(self, parts: Iterable[Tensor], *, of: int, lr: float, tau: float) -> Output:
        """Take one step on `of` micro-batches, a replay each; see Eager. Gradients keep their addresses."""
        self.optimizer.set_rates(lr=lr, tau=tau)
        coming = iter(parts)
        first = next(coming)
        if self._is_warm_up(of, first.shape):
            with self._aside():
                return super().accumulate(chain([first], coming), of=of, lr=lr, tau=tau)
        torch._foreach_zero_([p.grad for p in self.model.parameters() if p.grad is not None])
        losses, seen = [], []
        for views in chain([first], coming):
            output = self._replayed(views, partial(self._part, share=1 / of))
            losses.append(output.loss.clone())  # the next replay writes where this one did
            seen.append(output.representations.clone())
        self._move()
        return output._replace(loss=torch.stack(losses).mean(), representations=torch.cat(seen))

    def _is_warm_up(self, parts: int, shape: torch.Size) -> bool:
        """Tell whether the coming step runs eagerly; let the graph of another kind of step go first."""
        if self._kind != (parts, shape):
            self._kind, self._warm_ups = (parts, shape), 0
            self.release()
        self._warm_ups += 1
        return self._warm_ups <= WARM_UP

    def release(self) -> None:
        """Let the graph go, and its memory, gradients included."""
        if self._captured is not None:
            self._captured = None
            self.optimizer.zero_grad()
            self._free_memory()

    def _part(self, views: Tensor, *, share: float) -> Output:
        """Do what the graph of a micro-batch holds; what it returns keeps nothing else alive."""
        output = self._backward(views, share=share)
        return output._replace(loss=output.loss.detach())

    def _replayed(self, views: Tensor, work: Callable[[Tensor], Output]) -> Output:
        if self._captured is None:
            self._captured = self._capture(views, work)
        step = self._captured
        step.views.copy_(views)  # 0.3 GB at 224 px and 512 images, against some 500 that the step moves (computed)
        step.replay()
        return step.output

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Run the with-block on the stream of the capture, since autograd's nodes remember their stream."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def _free_memory(self) -> None:
        """Give back what no tensor holds (host sync, once a size)."""
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()

    def _capture(self, views: Tensor, work: Callable[[Tensor], Output]) -> Captured:
        """Record work without running it (host sync, once a size)."""
        static, graph = torch.empty_like(views), torch.cuda.CUDAGraph()
        self._free_memory()  # of the warm-ups; and what is freed during a capture would record its events into it
        # thread_local: the loader's threads may pin memory meanwhile
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            output = work(static)
        return Captured(graph.replay, static, output)


class Compiled(Eager):
    """Let torch.compile fuse forward, loss and backward from the reference operations; LARS stays as it is."""

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


def engine(
    name: str, model: BYOL, optimizer: Optimizer, *, precision: str = "float32", lagged_target: bool = False
) -> Eager:
    """Build the engine of that name, one of ENGINES, in a precision of PRECISIONS.

    Raises ConfigError for a name it does not know, for graph or compile without a GPU, and for what cannot be captured.
    """
    for kind, asked, known in (("engine", name, ENGINES), ("precision", precision, PRECISIONS)):
        if asked not in known:
            raise ConfigError(f"no {kind} {asked!r}; choose one of {', '.join(known)}")
    if name != "eager" and not next(model.parameters()).is_cuda:
        raise ConfigError(f"engine {name} needs a GPU and this run is on the CPU; leave --engine out")
    if name == "graph" and isinstance(optimizer, apex.LARC):
        raise ConfigError("apex's LARC reads norms on the host, which a CUDA graph cannot hold; give --engine eager")
    return ENGINES[name](model, optimizer, precision=PRECISIONS[precision], lagged_target=lagged_target)
