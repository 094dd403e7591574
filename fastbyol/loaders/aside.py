"""Know how to run a generator of batches in a thread of its own, a few batches ahead of who takes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

import torch

from fastbyol.loaders import Batch


def prefetch_in_thread(
    batches: Generator[Batch, None, None], *, prefetch: int, device: torch.device | str
) -> Generator[Batch, None, None]:
    """Yield the batches, up to `prefetch` of them made in advance by another thread; raise here what it raises.

    Closing closes `batches` in that thread, and ends it.
    """
    with ThreadPoolExecutor(1, "assemble", _use, (torch.device(device),)) as thread:
        pending = deque(thread.submit(next, batches, None) for _ in range(prefetch))
        try:
            while (batch := pending.popleft().result()) is not None:
                pending.append(thread.submit(next, batches, None))
                yield batch
                del batch  # while the next is awaited, its memory is the caller's to free
        finally:
            for future in pending:
                future.cancel()
            thread.submit(batches.close).result()


def _use(device: torch.device) -> None:
    """Let a new thread pin memory for, and copy to, its own GPU and not the first of the machine."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
