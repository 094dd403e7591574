"""Prefetching of batches by a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

import torch

from fastbyol.loaders import Batch


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
