"""Compilation, in parallel and beforehand, of kernels that benchmarks try in many sizes: minutes one at a time."""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, from a checkout

import torch

from benchmarks.cases import pointwise
from benchmarks.gpu.parts import SKIPPED

WORKERS = 8  # beside tests, which compile, too
IMAGES = 32  # as divisible by 16 as a benchmark's: for other sizes Triton compiles anew


def compile_shape(number: int) -> str:
    """Run every size of the 1x1 convolution's kernel for a shape, once, on few images."""
    inputs, side, channels = pointwise.SHAPES[number]
    x, weight = pointwise.drawn((IMAGES, inputs, side, side), channels, "cuda", torch.bfloat16)
    norm = pointwise.norm_of(channels, "cuda")
    done = []
    for name, convolution in pointwise.rivals("cuda", inputs, channels):
        if name.startswith("fastbyol"):
            try:
                convolution(x, weight, norm)
                torch.cuda.synchronize()
                done.append(f"{name}: compiled")
            except RuntimeError as error:  # the benchmark will say it in a row
                done.append(f"{name}: {error}")
    return "\n".join(done)


def main() -> int:
    """Compile all shapes."""
    if not torch.cuda.is_available():
        print("no GPU")
        return SKIPPED
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        for text in pool.map(compile_shape, range(len(pointwise.SHAPES))):
            print(text, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
