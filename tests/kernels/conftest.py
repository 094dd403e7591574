"""Device of the kernel tests, a GPU or Triton's interpreter (TRITON_INTERPRET=1), and a record of launches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils import deterministic
from triton import knobs
from triton.runtime.interpreter import GridExecutor

from fastbyol.kernels.dispatch import runs_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def device() -> str:
    """Name the device the kernels run on."""
    return DEVICE


@pytest.fixture(autouse=True)
def _triton_runs() -> None:
    if not runs_triton(torch.empty(0, device=DEVICE)):
        pytest.skip("no GPU and no TRITON_INTERPRET=1: `make test` runs these in a second process")


@pytest.fixture(autouse=True)
def _exact_float32() -> Iterator[None]:
    """Keep cuDNN from rounding float32 to TF32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Keep the interpreter, which computes on one core, and the references' small tensors from waiting for threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a split of batch norm's rows one tile: the interpreter spends its time on empty ones otherwise."""
    monkeypatch.setattr("fastbyol.kernels.batchnorm_statistics.SPLIT_TILES", 1)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Let torch.empty return NaN and huge integers, so that nothing passes that was not written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    filled = deterministic.fill_uninitialized_memory
    deterministic.fill_uninitialized_memory = True  # other tests may have left it off
    assert torch.empty(1).isnan()
    yield
    deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Collect an entry for each kernel that Triton launches or interprets from here on."""
    launched: list[str] = []
    if knobs.runtime.interpret:
        interpret = GridExecutor.__call__

        def note(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
            launched.append(self.fn.__name__)
            interpret(self, *args, **kwargs)

        monkeypatch.setattr(GridExecutor, "__call__", note)
        yield launched
        return

    def hook(metadata: Any) -> None:
        launched.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(hook)
    yield launched
    knobs.runtime.launch_enter_hook.remove(hook)
