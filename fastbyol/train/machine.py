"""Settings that follow from the machine where they are not given: device, engine, precision and decoding threads."""

from __future__ import annotations

from fastbyol.loaders import default_workers
from fastbyol.system.device import choose_device, default_precision
from fastbyol.system.distributed import local_ranks, ranks
from fastbyol.system.limits import available_cores


def suggest(device: str | None) -> dict[str, str | int]:
    """Return the settings for a device, by default the GPU where there is one; raise ConfigError where it is missing.

    On one GPU a step is a CUDA graph; several ranks cannot have one.
    """
    chosen = choose_device(device)
    is_gpu = chosen == "cuda"
    return {
        "device": chosen,
        "engine": "graph" if is_gpu and ranks() == 1 else "eager",
        "precision": default_precision(chosen),
        "workers": default_workers(chosen, cores=available_cores(), local_ranks=local_ranks()),
    }
