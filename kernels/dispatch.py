"""The one rule of dispatch: Triton where it can run a tensor, the plain torch of reference.py elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.jit import JITFunction

_only_allocates: ContextVar[bool] = ContextVar("only_allocates", default=False)


def runs_triton(x: Tensor) -> bool:
    """Tell whether the Triton kernels take x: on a GPU, or on any device under Triton's interpreter.

    Not in float64, which is the reference's alone, and not inside torch.compile, which fuses the reference itself. The
    interpreter runs kernels on CPU tensors, slowly, in a process started with TRITON_INTERPRET=1.
    """
    if torch.compiler.is_compiling() or x.dtype == torch.float64:
        return False
    return x.is_cuda or knobs.runtime.interpret or _only_allocates.get()


@contextmanager
def only_allocating() -> Iterator[None]:
    """Let the kernels' wrappers take any tensor in the with-block: they allocate as on a GPU and launch nothing.

    For fake tensors, whose memory is counted (fastbyol.memory): what the results hold is arbitrary.
    """
    token, run = _only_allocates.set(True), JITFunction.run

    def launch_nothing(*_: Any, **__: Any) -> None: ...

    JITFunction.run = launch_nothing
    try:
        yield
    finally:
        JITFunction.run = run
        _only_allocates.reset(token)
