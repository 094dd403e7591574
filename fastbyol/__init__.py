"""fastbyol: BYOL encoders from a folder of images and a deadline."""

import importlib
import os
from pathlib import Path
from typing import Any

# Make idle threads spin for about 0.1 ms, then sleep. Libgomp's default spins far longer: as fast on an idle machine,
# but 1.5 and 3.9 times slower in two interleaved pairs beside busy processes. Sleeping at once halves the speed on an
# idle machine (docs/log.md). Torch reads the variable when it loads its thread pool, so it is set before that; a user's
# own setting wins.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")

__all__ = ["__version__", "load_encoder"]  # __init__.pyi declares them for type checkers


def __dir__() -> list[str]:
    """List the names of __all__, too, which are there only once they are used."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Import `load_encoder`, which needs torch, or look up `__version__` on first use."""
    if name == "load_encoder":
        return importlib.import_module("fastbyol.export").load_encoder
    if name == "__version__":
        return _version()
    raise AttributeError(f"module 'fastbyol' has no attribute {name!r}")


def _version() -> str:
    """Return the installed version or, in a source tree that is not installed, that of its pyproject.toml."""
    metadata = importlib.import_module("importlib.metadata")
    try:
        return str(metadata.version("fastbyol"))
    except metadata.PackageNotFoundError:
        project = Path(__file__).parents[1] / "pyproject.toml"
        lines = project.read_text().split("\n") if project.exists() else []
        return next((line.split('"')[1] for line in lines if line.startswith("version = ")), "unknown")
