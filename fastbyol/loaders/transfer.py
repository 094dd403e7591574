"""Know how pixels get to the GPU beside the computation: one copy a batch, on a stream of its own."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import replace

import torch

from fastbyol.loaders import Batch


def to_gpu(batches: Generator[Batch, None, None], device: torch.device | str) -> Generator[Batch, None, None]:
    """Yield the batches with their pixels on the GPU; the host waits for no copy.

    The copy starts when a batch is handed out, so it runs beside the steps queued before it. Pinned buffers come from
    torch's caching allocator, which takes one back only after the copies out of it are done. Pixels that are on the
    device already, of loader dali or memory, are not copied.
    """
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with closing(batches):
        for batch in batches:
            with torch.cuda.stream(stream):
                pixels = batch.pixels.to(device, non_blocking=True)
            current = torch.cuda.current_stream(device)
            current.wait_stream(stream)
            pixels.record_stream(current)  # allocated on the other stream: not to be reused before this one has read it
            moved = replace(batch, pixels=pixels)
            del batch, pixels
            yield moved
            del moved  # while the next is awaited, its memory, on host and GPU, is the caller's to free
