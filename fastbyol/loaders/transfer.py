"""Copies of batches to the GPU beside the computation, on a stream of their own."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import replace

import torch

from fastbyol.loaders import Batch


def to_gpu(batches: Generator[Batch, None, None], device: torch.device | str) -> Generator[Batch, None, None]:
    """Yield the batches with their pixels on the GPU; the host does not wait for the copies.

    A copy starts when its batch is yielded, so it runs beside the steps queued before it. Pinned buffers come from
    torch's caching allocator, which reuses one only after the copies from it are done. Pixels that are already on the
    device, from loaders dali and memory, are not copied.
    """
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with closing(batches):
        for batch in batches:
            with torch.cuda.stream(stream):
                pixels = batch.pixels.to(device, non_blocking=True)
            current = torch.cuda.current_stream(device)
            current.wait_stream(stream)
            pixels.record_stream(current)  # allocated on the other stream: not reused before this stream has read it
            on_gpu = replace(batch, pixels=pixels)
            del batch, pixels
            yield on_gpu
            del on_gpu  # so that only the caller holds its memory, on host and GPU, while the next is awaited
