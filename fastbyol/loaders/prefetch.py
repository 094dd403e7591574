"""Prefetching of batches by a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import torch

from fastbyol.loaders.batch import Batch


def prefetch_in_thread(
    batches: Generator[Batch, None, None], *, prefetch: int, device: torch.device | str
) -> Generator[Batch, None, None]:
    """Yield the batches, up to `prefetch` of them made in advance by a thread, and raise the thread's exceptions.

    Closing the generator closes `batches` in that thread and ends the thread.
    """
    with ThreadPoolExecutor(1, "assemble", _set_device, (torch.device(device),)) as thread:
        pending = deque(thread.submit(next, batches, None) for _ in range(prefetch))
        try:
            while (batch := pending.popleft().result()) is not None:
                pending.append(thread.submit(next, batches, None))
                yield batch
                del batch  # so that only the caller holds it while the next is awaited
        finally:
            for future in pending:
                future.cancel()
            thread.submit(batches.close).result()


def _set_device(device: torch.device) -> None:
    """Make a new thread use this rank's GPU, not the machine's first, for pinned memory and copies."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


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
