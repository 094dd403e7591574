"""Dispatch between the Triton kernels and the plain torch of reference.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.jit import JITFunction

_allocates_only: ContextVar[bool] = ContextVar("allocates_only", default=False)


def runs_triton(x: Tensor) -> bool:
    """Return whether the Triton kernels can run on x: on a GPU, or on any device under Triton's interpreter.

    Returns False for float64, which only the reference supports, inside torch.compile, which fuses the reference
    itself, and under torch.jit.trace, which cannot record a kernel and makes tensors of the sizes it takes. The
    interpreter runs kernels on CPU tensors, slowly, in a process started with TRITON_INTERPRET=1.
    """
    if torch.compiler.is_compiling() or x.dtype == torch.float64:
        return False
    if torch.jit.is_tracing():  # type: ignore[attr-defined]  # torch's stubs do not export it
        return False
    return x.is_cuda or knobs.runtime.interpret or _allocates_only.get()


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that convolutions of x compute in: autocast's, where it is enabled, or x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@contextmanager
def allocate_only(seen: Callable[[Any, tuple[Any, ...], dict[str, Any]], None] | None = None) -> Iterator[None]:
    """Make the kernels' wrappers allocate as on a GPU but launch nothing, for any tensor, in the with-block.

    Used with fake tensors to measure memory (fastbyol.train.memory); the values of the results are arbitrary. seen:
    called with the kernel and the arguments, by place and by name, of each launch that would have been.
    """
    token, run = _allocates_only.set(True), JITFunction.run

    def launch_nothing(kernel: Any, *args: Any, **kwargs: Any) -> None:
        if seen is not None:
            seen(kernel, args, kwargs)

    JITFunction.run = launch_nothing
    try:
        yield
    finally:
        JITFunction.run = run
        _allocates_only.reset(token)
