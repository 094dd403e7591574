"""Laws of who may import whom, read from the source."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STDLIB = frozenset(sys.stdlib_module_names)
TOP = "."  # the modules at the top of fastbyol/: settings, images, views, schedules
MAY_IMPORT = {  # the folders of fastbyol/ that the modules of a folder may import beside their own
    "cli": {
        "train",
        "ablations",
        "embed",
        "evaluate",
        "monitor",
        "export",
        "loaders",
        "model",
        "recipes",
        "report",
        "storage",
        "system",
        "weights",
        TOP,
    },
    "train": {
        "report",
        "evaluate",
        "monitor",
        "export",
        "loaders",
        "model",
        "optim",
        "recipes",
        "storage",
        "system",
        "weights",
        "kernels",
        TOP,
    },
    "ablations": {"evaluate", "monitor", "storage", "system", TOP},
    "report": {"evaluate", "loaders", "storage", "kernels", TOP},
    "embed": {"evaluate", "model", "storage", "system", TOP},
    "evaluate": {"loaders", "model", "storage", "system", "kernels", TOP},
    "monitor": {"loaders", "model", "storage", "system", TOP},
    "export": {"model", "storage", "system", "kernels", TOP},
    "weights": {"export", "model", "storage", TOP},
    "loaders": {"system", "kernels", TOP},
    "model": {"kernels", TOP},
    "optim": {"kernels", TOP},
    "recipes": {TOP},
    "storage": {TOP},
    "system": {TOP},
    TOP: {"kernels"},
}
NEEDED_BY_DATA_PREP: dict[str, set[str]] = {  # and the packages that each of them may need
    "fastbyol": set(),
    "fastbyol.beton": {"numpy"},
    "fastbyol.errors": set(),
    "fastbyol.jpeg": {"numpy", "PIL", "simplejpeg"},
    "fastbyol.names": set(),
    "fastbyol.ranges": set(),
    "fastbyol.storage.files": set(),
    "fastbyol.system.command_line": set(),
    "fastbyol.system.limits": set(),
    "fastbyol.system.output": set(),
    "fastbyol.system.signals": set(),
}
# for python -m: they import the command line they start
STARTERS = {"fastbyol.__main__", "fastbyol.embed.__main__", "fastbyol.eval", "fastbyol.train.__main__"}


def modules() -> dict[str, Path]:
    """Name every module of the three packages as it is installed."""
    places = {
        "fastbyol": ROOT / "fastbyol",
        "fastbyol.kernels": ROOT / "kernels",
        "fastbyol.data_prep": ROOT / "data_prep",
    }
    found = {}
    for package, folder in places.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if package == "fastbyol" and parts[0] in ("kernels", "data_prep"):
                continue
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> set[str]:
    """Name every module a file imports; `from package import module` names the module."""
    known, found = modules(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & known.keys()
            found |= submodules or {node.module}
    return found - {"__future__"}


@pytest.mark.parametrize("name", [n for n in modules() if n.startswith("fastbyol.kernels")])
def test_kernels_import_only_torch_and_triton(name: str) -> None:
    allowed = STDLIB | {"torch", "triton"}
    for imported in imports(modules()[name]):
        assert imported.startswith("fastbyol.kernels") or imported.split(".")[0] in allowed


@pytest.mark.parametrize("name", [n for n in modules() if n.startswith("fastbyol.data_prep")])
def test_data_prep_imports_beton_numpy_and_codecs_only(name: str) -> None:
    allowed = STDLIB | {"numpy", "PIL", "tqdm", "pyarrow", "fsspec", "aiohttp"}
    ours = set(NEEDED_BY_DATA_PREP)
    for imported in imports(modules()[name]):
        inside = imported in ours or imported.startswith("fastbyol.data_prep")
        assert inside or imported.split(".")[0] in allowed


def test_what_data_prep_imports_needs_no_torch() -> None:
    for name, packages in NEEDED_BY_DATA_PREP.items():
        found = imports(modules()[name]) - set(NEEDED_BY_DATA_PREP)
        assert {imported.split(".")[0] for imported in found} <= STDLIB | packages


def folder_of(name: str) -> str:
    """Return the folder of fastbyol/ that a module lies in, or TOP."""
    parts = name.split(".")
    is_inside = len(parts) > 1 and (parts[1] in MAY_IMPORT or parts[1] in ("kernels", "data_prep"))
    return parts[1] if is_inside else TOP


@pytest.mark.parametrize("name", [n for n in modules() if not n.startswith(("fastbyol.kernels", "fastbyol.data_prep"))])
def test_folders_import_downwards_only(name: str) -> None:
    if name in STARTERS:
        return
    folder = folder_of(name)
    for imported in imports(modules()[name]):
        if imported.startswith("fastbyol"):
            assert folder_of(imported) in MAY_IMPORT[folder] | {folder}, f"{name} imports {imported}, which it may not"


def test_folders_have_an_order() -> None:
    placed: set[str] = {"kernels"}
    while left := [folder for folder in MAY_IMPORT if folder not in placed]:
        free = {folder for folder in left if MAY_IMPORT[folder] <= placed}
        assert free, f"MAY_IMPORT lets {left} import one another in a circle"
        placed |= free


def test_modules_import_one_another_in_no_circle() -> None:
    known = modules()
    graph = {name: {found for found in imports(path) if found in known} - {name} for name, path in known.items()}
    while graph:
        free = [name for name, needed in graph.items() if not needed & graph.keys()]
        assert free, f"a circle of imports among {sorted(graph)}"
        for name in free:
            del graph[name]


def test_nothing_imports_tests_or_benchmarks() -> None:
    for path in modules().values():
        assert not {name.split(".")[0] for name in imports(path)} & {"tests", "benchmarks", "kernels", "data_prep"}
