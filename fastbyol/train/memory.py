"""Prediction of a training step's peak GPU memory, and the number of micro-batches in which it fits.

The prediction runs model, loss and backward on fake tensors: real shapes and lifetimes, but no data and no GPU. The
kernels' wrappers allocate as usual and launch nothing. Not counted are cuDNN's workspaces and the allocator's
fragmentation, for which a share of the card is left free, and the decoded images before they become views.
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

from fastbyol.config import Recipe
from fastbyol.errors import ConfigError
from fastbyol.kernels.dispatch import allocate_only
from fastbyol.model.byol import BYOL
from fastbyol.model.parts import count_moments
from fastbyol.registry import OPTIMIZERS
from fastbyol.train.step import PRECISIONS

GIB = 2**30
CONTEXT_GIB = 1.5  # of a card taken by CUDA and the driver
BLOCK_BYTES = 512  # what torch's allocator rounds to
SHARE = 0.94  # of the free memory: the rest is lost to fragmentation
WORKSPACE_BYTES = GIB  # for cuDNN and cuBLAS
VIEW_COPIES = 3.0  # besides the views a step reads: those just made, and the planes they are made from
# the last is what cuDNN's search for an algorithm says
OUT_OF_MEMORY_PHRASES = ("out of memory", "status_alloc_failed", "unable to find an engine")
RECOMPUTED_LEAST = 0.65  # of the memory of a step that keeps everything: 0.82 for a ResNet-50, 0.73 for a ResNet-18


class _PeakTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tracker of the storages that operations in the with-block allocate, and of their peak in bytes."""

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
                self._track(value.untyped_storage())
        return result

    def _track(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._bytes:
            return
        self._bytes[key] = math.ceil(storage.nbytes() / BLOCK_BYTES) * BLOCK_BYTES
        self._now += self._bytes[key]
        self.peak_bytes = max(self.peak_bytes, self._now)
        weakref.finalize(storage, self._untrack, key)

    def _untrack(self, key: int) -> None:
        self._now -= self._bytes.pop(key)


def _make_fake(model: nn.Module) -> int:
    """Replace the meta tensors of a model by fake ones on the host; return the bytes of its trainable parameters."""
    trainable_bytes = 0
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                fake = torch.empty_like(tensor, device="cpu")
                if isinstance(tensor, nn.Parameter):
                    module._parameters[name] = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    trainable_bytes += fake.nbytes if tensor.requires_grad else 0
                else:
                    module._buffers[name] = fake
    return trainable_bytes


def step_bytes(
    recipe: Recipe, *, images: int, parts: int = 1, precision: str, recomputes: bool = False, ranks: int = 1
) -> int:
    """Predict the peak memory in bytes of a step of `images` images in `parts` equal micro-batches.

    Includes weights, target, gradients and the optimiser's moments. precision: of the activations, bfloat16 or float32.
    recomputes: see Encoder.set_recompute. ranks: with more than one, each holds a second copy of its gradients, in
    buckets. Takes a second or two for a ResNet-50.
    """
    with torch.device("meta"):
        model = BYOL(
            recipe.encoder,
            recipe.head,
            seed=0,
            views=len(recipe.global_views),
            target_statistics=recipe.target_statistics,
            objective=recipe.objective,
        )
    model.online.encoder.set_recompute(recomputes)
    dtype = PRECISIONS[precision]
    with allocate_only(), FakeTensorMode(allow_non_fake_inputs=True), _PeakTracker() as tracker:
        trainable_bytes = _make_fake(model)
        views = [
            torch.empty(count * (images // parts), 3, px, px, dtype=dtype, memory_format=torch.channels_last)
            for count, px in recipe.sizes_of_views(recipe.crop_px)
        ]
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            output = model(*views)
        output.loss.backward()
    # gradients stay allocated during the next part's forward, and DistributedDataParallel copies them into buckets
    gradient_bytes: int = trainable_bytes * ((parts > 1) + (ranks > 1))
    moment_bytes = trainable_bytes * count_moments(OPTIMIZERS.find(recipe.optim.optimizer))
    needed: int = (
        tracker.peak_bytes + moment_bytes + gradient_bytes + round(VIEW_COPIES * sum(each.nbytes for each in views))
    )
    return needed


def format_bytes(count: int) -> str:
    """Format a number of bytes in GiB, or in MiB below 1 GiB."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"


@dataclass(frozen=True)
class Fit:
    """How a step fits the memory: number of micro-batches (`parts`), recomputation, bytes needed and usable.

    whole_bytes: what the batch in one part, without recomputation, would need. is_user_choice: the user chose `parts`.
    """

    images: int
    parts: int
    recomputes: bool
    step_bytes: int
    whole_bytes: int
    usable_bytes: int
    is_user_choice: bool = False

    def __str__(self) -> str:
        """Describe in one line what was chosen and what that changes."""
        needs = f"a step of {self.images} images needs {format_bytes(self.whole_bytes)}"
        usable = f"of {format_bytes(self.usable_bytes)} that it may use"
        if self.parts == 1 and not self.recomputes:
            return f"{needs} {usable} (predicted)"
        each = self.images // self.parts
        chosen = [f"{self.parts} micro-batches of {each} images"] if self.parts > 1 else []
        chosen += ["some activations recomputed in the backward"] if self.recomputes else []
        changes = f"; batch norm's population is {each} images, not {self.images}" if self.parts > 1 else ""
        return (
            f"{needs} {usable}; so {' with '.join(chosen)}: {format_bytes(self.step_bytes)} (predicted){changes}"
            f"{'' if self.is_user_choice else '; give --micro-batches N to choose another number'}"
        )


def micro_batch_counts(images: int, *, above: int = 0) -> Iterator[int]:
    """Yield, in ascending order, the numbers of equal micro-batches of at least 2 images that make up `images`."""
    return (parts for parts in range(above + 1, images // 2 + 1) if images % parts == 0)


def fit(  # noqa: PLR0913  # all by name
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
    """Choose the fewest micro-batches in which a step of `images` images fits: `least_parts` or more, or `only_parts`.

    Activations are recomputed only where that saves a micro-batch, since it costs time. Raises ConfigError if even
    micro-batches of 2 images do not fit, or if a step that does not fit cannot be split (lagged target, DALI's crops).
    """
    count = partial(step_bytes, recipe, images=images, precision=precision, ranks=ranks)
    whole = count()
    counts = [parts for parts in micro_batch_counts(images) if parts >= least_parts and only_parts in (None, parts)]
    if not can_split or recipe.lagged_target:
        counts = [parts for parts in counts if parts == 1]
    for parts in counts:
        if RECOMPUTED_LEAST * whole / parts > usable_bytes:
            continue
        for recomputes in (False, True)[: 1 + can_recompute]:
            is_whole = parts == 1 and not recomputes
            needed = whole if is_whole else count(parts=parts, recomputes=recomputes)
            if needed <= usable_bytes:
                return Fit(
                    images, parts, recomputes, needed, whole, usable_bytes, is_user_choice=only_parts is not None
                )
    why = "" if only_parts is None else f" in {only_parts} micro-batches"
    if recipe.lagged_target or not can_split:
        why = ", and a lagged target, or DALI's crops, cannot be split"
    raise ConfigError(
        f"a step of {images} images of {recipe.crop_px} px needs {format_bytes(whole)} of the "
        f"{format_bytes(usable_bytes)} that it may use on this GPU{why}; give a smaller --batch-size or encoder"
    )


def free_bytes() -> int:
    """Return the free bytes of the current GPU, including those that torch's allocator caches."""
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def usable_bytes(free_bytes: int) -> int:
    """Return the part of a card's free bytes that a step's predicted memory may fill."""
    return max(int(SHARE * free_bytes) - WORKSPACE_BYTES, 0)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Tell whether an error or one of its causes means that a GPU is out of memory, in any library's wording."""
    while error is not None:
        message = str(error).lower()
        if isinstance(error, torch.OutOfMemoryError) or any(phrase in message for phrase in OUT_OF_MEMORY_PHRASES):
            return True
        error = error.__cause__ or error.__context__
    return False
