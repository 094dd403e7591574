"""fastbyol: BYOL encoders from a folder of images and a deadline."""

import importlib
import os
from typing import Any

# Idle threads spin for about 0.1 ms, then sleep. Libgomp's own default spins far longer: as fast alone, but 1.5 and 3.9
# times slower in two interleaved pairs beside busy processes; sleeping at once halves the speed alone (docs/log.md).
# Read when torch loads its thread pool, so it has to be said before that; a user's own choice stands.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")


def __getattr__(name: str) -> Any:
    """Find `load_encoder` when it is first used, since it imports torch, and `fastbyol.beton` needs none."""
    if name == "load_encoder":
        return importlib.import_module("fastbyol.export").load_encoder
    raise AttributeError(f"module 'fastbyol' has no attribute {name!r}")
