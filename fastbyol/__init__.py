"""fastbyol: BYOL encoders from a folder of images and a deadline."""

import importlib
import os
from typing import Any

# Make idle threads spin for about 0.1 ms, then sleep. Libgomp's default spins far longer: as fast on an idle machine,
# but 1.5 and 3.9 times slower in two interleaved pairs beside busy processes. Sleeping at once halves the speed on an
# idle machine (docs/log.md). Torch reads the variable when it loads its thread pool, so it is set before that; a user's
# own setting wins.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")


def __getattr__(name: str) -> Any:
    """Import `load_encoder` on first use: it imports torch, which `fastbyol.beton` does not need."""
    if name == "load_encoder":
        return importlib.import_module("fastbyol.export").load_encoder
    raise AttributeError(f"module 'fastbyol' has no attribute {name!r}")
