"""Laws of the package: the wheel holds every module under fastbyol, and all of it imports from anywhere."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMPORT_ALL = """
import importlib, importlib.util, pkgutil, sys
import fastbyol
assert fastbyol.__file__.startswith(sys.argv[1]), fastbyol.__file__
names = [module.name for module in pkgutil.walk_packages(fastbyol.__path__, "fastbyol.")]
needs_extra = {"fastbyol.loaders.ffcv": "ffcv"} | dict.fromkeys(
    ("fastbyol.loaders.dali", "fastbyol.loaders.dali_crop"), "nvidia"
)
for name in names:
    if name not in needs_extra or importlib.util.find_spec(needs_extra[name]):
        importlib.import_module(name)
print("\\n".join(names))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the files git would ship."""
    folder = tmp_path_factory.mktemp("wheel")
    skipped = shutil.ignore_patterns(
        ".git", ".venv*", "runs", "build", "*.egg-info", "__pycache__", ".*_cache", "tests"
    )
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=skipped)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, folder / "source"]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_fastbyol_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"fastbyol"}
    held = {name for name in names if name.endswith(".py")}
    mapped = {"kernels": "fastbyol/kernels", "data_prep": "fastbyol/data_prep", "fastbyol": "fastbyol"}
    for folder, place in mapped.items():
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{place}/{path.relative_to(ROOT / folder)}" in held
    pages = [path for kind in ("html", "css", "js") for path in (ROOT / "fastbyol").glob(f"*/*.{kind}")]
    data = {"fastbyol/py.typed", "fastbyol/__init__.pyi", *(str(path.relative_to(ROOT)) for path in pages)}
    assert data <= set(names)


def test_everything_imports_from_an_empty_directory(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    empty = tmp_path / "empty"
    empty.mkdir()
    command = [sys.executable, "-c", IMPORT_ALL, str(site)]
    found = subprocess.run(
        command, cwd=empty, env={"PYTHONPATH": str(site)}, check=True, capture_output=True, text=True
    )
    assert {"fastbyol.kernels.reference", "fastbyol.data_prep.cli", "fastbyol.train"} <= set(found.stdout.split())
