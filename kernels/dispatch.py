"""Know the one rule: Triton where it can run a tensor, the plain torch of reference.py elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor
from triton import knobs


def runs_triton(x: Tensor) -> bool:
    """Tell whether the Triton kernels take x: on a GPU, or on any device under Triton's interpreter.

    Not in float64, which is the reference's alone, and not inside torch.compile, which fuses the reference itself. The
    interpreter runs kernels on CPU tensors, slowly, in a process started with TRITON_INTERPRET=1.
    """
    if torch.compiler.is_compiling() or x.dtype == torch.float64:
        return False
    return x.is_cuda or knobs.runtime.interpret
