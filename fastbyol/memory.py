"""Memory of a training step on a GPU: its peak, predicted before anything runs, and what to do where it is too much.

The prediction runs model, loss and backward on fake tensors: real shapes and lifetimes, no data, no GPU. The kernels'
wrappers allocate what they would and launch nothing. Not counted: cuDNN's workspaces and the allocator's fragments, for
which a share of the card is left; and the images' own bytes before they become views.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastbyol.byol import BYOL, VIEWS
from fastbyol.config import ConfigError, Recipe
from fastbyol.kernels.dispatch import allocate_only
from fastbyol.step import PRECISIONS

GIB = 2**30
CONTEXT_GIB = 1.5  # of a card that CUDA and the driver take before anything else
BLOCK_BYTES = 512  # what torch's allocator rounds to
SHARE = 0.94  # of the free memory: the rest goes in fragments
WORKSPACE_BYTES = GIB  # for cuDNN and cuBLAS
VIEW_COPIES = 3.0  # beside the views a step reads: those just made, and the planes they were made from
RUN_OUT = ("out of memory", "status_alloc_failed", "unable to find an engine")  # the last is cuDNN's search
RECOMPUTED_LEAST = 0.75  # of a step that keeps everything: 0.85 for a ResNet-50


class _Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follow the bytes of all storages that operations in the with-block make, and the most there were at a time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self._bytes: dict[int, int] = {}
        self._now = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._follow(value.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._bytes:
            return
        self._bytes[key] = math.ceil(storage.nbytes() / BLOCK_BYTES) * BLOCK_BYTES
        self._now += self._bytes[key]
        self.peak_bytes = max(self.peak_bytes, self._now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._now -= self._bytes.pop(key)


def _faked(model: nn.Module) -> int:
    """Give a model on the meta device fake tensors on the host; return the bytes of its trainable parameters."""
    trained = 0
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                fake = torch.empty_like(tensor, device="cpu")
                if isinstance(tensor, nn.Parameter):
                    module._parameters[name] = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    trained += fake.nbytes if tensor.requires_grad else 0
                else:
                    module._buffers[name] = fake
    return trained


def step_bytes(
    recipe: Recipe, *, images: int, parts: int = 1, precision: str, recomputes: bool = False, ranks: int = 1
) -> int:
    """Predict the most memory, in bytes, that a step of `images` images takes in `parts` equal micro-batches.

    precision: bfloat16 or float32, that of the activations. recomputes: see batchnorm.then. ranks: where there are
    more, each has a second copy of its gradients in buckets. Weights, target, gradients and momenta are in it. Takes a
    second or two for a ResNet-50.
    """
    with torch.device("meta"):
        model = BYOL(
            recipe.encoder,
            recipe.head,
            seed=0,
            target_statistics=recipe.target_statistics,
            objective=recipe.objective,
        )
    model.online.encoder.recomputes(recomputes)
    dtype, side = PRECISIONS[precision], recipe.crop_px
    with allocate_only(), FakeTensorMode(allow_non_fake_inputs=True), _Peak() as live:
        trained = _faked(model)
        shape = (VIEWS * (images // parts), 3, side, side)
        views = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            output = model(views)
        output.loss.backward()
    gradients: int = trained * ((parts > 1) + (ranks > 1))  # they wait through the next part's forward; buckets
    needed: int = live.peak_bytes + trained + gradients + round(VIEW_COPIES * views.nbytes)
    return needed


def size(count: int) -> str:
    """Write a number of bytes in GiB, or MiB below one."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"


@dataclass(frozen=True)
class Fit:
    """Say how a step is computed: in `parts`, with activations kept or recomputed; and the bytes it needs and may use.

    whole_bytes: what the whole batch in one part would need, everything kept. is_asked: the user chose the parts.
    """

    images: int
    parts: int
    recomputes: bool
    step_bytes: int
    whole_bytes: int
    usable_bytes: int
    is_asked: bool = False

    def __str__(self) -> str:
        """Describe it in one line: what was chosen and what that changes."""
        needs = f"a step of {self.images} images needs {size(self.whole_bytes)}"
        usable = f"of {size(self.usable_bytes)} that it may use"
        if self.parts == 1 and not self.recomputes:
            return f"{needs} {usable} (predicted)"
        each = self.images // self.parts
        chosen = [f"{self.parts} micro-batches of {each} images"] if self.parts > 1 else []
        chosen += ["some activations computed again in the backward"] if self.recomputes else []
        changes = f"; batch norm's population is {each} images, not {self.images}" if self.parts > 1 else ""
        return (
            f"{needs} {usable}; so {' with '.join(chosen)}: {size(self.step_bytes)} (predicted){changes}"
            f"{'' if self.is_asked else '; --micro-batches N chooses otherwise'}"
        )


def divisors(images: int, *, above: int = 0) -> Iterator[int]:
    """Yield the numbers of equal micro-batches of 2 images or more that `images` can be computed in, rising."""
    return (parts for parts in range(above + 1, images // 2 + 1) if images % parts == 0)


def fit(  # noqa: PLR0913  # what a choice of this kind rests on, all by name
    recipe: Recipe,
    *,
    images: int,
    precision: str,
    usable_bytes: int,
    least_parts: int = 1,
    only_parts: int | None = None,
    can_split: bool = True,
    can_recompute: bool = True,
    ranks: int = 1,
) -> Fit:
    """Choose the fewest micro-batches, from `least_parts` or only so many, in which a step of `images` images fits.

    Activations are recomputed only where that saves a micro-batch, since they cost time. Raises ConfigError where not
    even micro-batches of 2 images fit, or where the recipe cannot be split (a lagged target).
    """
    count = partial(step_bytes, recipe, images=images, precision=precision, ranks=ranks)
    whole = count()
    counts = [parts for parts in divisors(images) if parts >= least_parts and only_parts in (None, parts)]
    if not can_split or recipe.lagged_target:
        counts = [parts for parts in counts if parts == 1]
    for parts in counts:
        if RECOMPUTED_LEAST * whole / parts > usable_bytes:
            continue
        for recomputes in (False, True)[: 1 + can_recompute]:
            is_whole = parts == 1 and not recomputes
            needed = whole if is_whole else count(parts=parts, recomputes=recomputes)
            if needed <= usable_bytes:
                return Fit(images, parts, recomputes, needed, whole, usable_bytes, is_asked=only_parts is not None)
    why = "" if only_parts is None else f" in {only_parts} micro-batches"
    if recipe.lagged_target or not can_split:
        why = ", and a lagged target, or DALI's crops, cannot be split"
    raise ConfigError(
        f"a step of {images} images of {recipe.crop_px} px needs {size(whole)} of the "
        f"{size(usable_bytes)} that it may use on this GPU{why}; give a smaller --batch-size or encoder"
    )


def free_bytes() -> int:
    """Read how much memory of the current GPU is free, what torch's allocator keeps unused included."""
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def usable_bytes(free_bytes: int) -> int:
    """Say how much of a card's free memory a step may be predicted to take."""
    return max(int(SHARE * free_bytes) - WORKSPACE_BYTES, 0)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Tell whether an error, or what it came from, says that a GPU's memory has run out, in any library's words."""
    while error is not None:
        said = str(error).lower()
        if isinstance(error, torch.OutOfMemoryError) or any(words in said for words in RUN_OUT):
            return True
        error = error.__cause__ or error.__context__
    return False
