"""Laws of who may import whom, read from the source."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STDLIB = frozenset(sys.stdlib_module_names)
ORDER = (  # a module may import what stands below it, never what stands above
    ("fastbyol.train", "fastbyol.eval"),
    ("fastbyol.evaluate.arguments",),
    ("fastbyol.run", "fastbyol.tables.command"),
    ("fastbyol.closing",),
    ("fastbyol.loop", "fastbyol.report", "fastbyol.tables.page", "fastbyol.modelcard"),
    ("fastbyol.calibrate", "fastbyol.pipeline", "fastbyol.teller"),
    ("fastbyol.report.curves", "fastbyol.report.pictures", "fastbyol.report.timeline", "fastbyol.report.settings"),
    ("fastbyol.report.chart", "fastbyol.report.style", "fastbyol.evaluate.neighbours", "fastbyol.tables.cells"),
    ("fastbyol.scores",),
    ("fastbyol.fitting",),
    ("fastbyol.memory",),
    ("fastbyol.runfolder", "fastbyol.telemetry", "fastbyol.step", "fastbyol.formats"),
    ("fastbyol.events", "fastbyol.flops", "fastbyol.profiling", "fastbyol.wandb_run"),
    ("fastbyol.evaluate.dense", "fastbyol.evaluate.semi", "fastbyol.evaluate.transfer"),
    (
        "fastbyol.evaluate.finetune",
        "fastbyol.evaluate.knn",
        "fastbyol.evaluate.linear",
        "fastbyol.evaluate.logistic",
        "fastbyol.evaluate.masks",
    ),
    ("fastbyol.evaluate.features", "fastbyol.evaluate.metrics", "fastbyol.evaluate.splits"),
    ("fastbyol.apex", "fastbyol.saver", "fastbyol.export", "fastbyol.recipes", "fastbyol.evaluate.images"),
    ("fastbyol.checkpoint", "fastbyol.plan", "fastbyol.watchdog", "fastbyol.distributed"),
    ("fastbyol.recipes.contrastive", "fastbyol.tables", "fastbyol.tables.paper"),
    ("fastbyol.recipes.change", "fastbyol.recipes.small"),
    ("fastbyol.recipes.imagenet",),
    ("fastbyol.loaders.dali", "fastbyol.loaders.dali_crop", "fastbyol.loaders.ffcv", "fastbyol.loaders.memory"),
    ("fastbyol.loaders.aside", "fastbyol.loaders.native", "fastbyol.loaders.transfer"),
    ("fastbyol.loaders.faults",),
    ("fastbyol.loaders.packing", "fastbyol.loaders.ram", "fastbyol.loaders.stored"),
    ("fastbyol.probe",),
    ("fastbyol.byol", "fastbyol.optim", "fastbyol.loaders"),
    ("fastbyol.objective",),
    ("fastbyol.encoder", "fastbyol.views", "fastbyol.order", "fastbyol.schedule", "fastbyol.budget"),
    ("fastbyol.batchnorm", "fastbyol.device", "fastbyol.philox", "fastbyol.jpeg", "fastbyol.evaluate"),
    ("fastbyol.beton",),
    ("fastbyol.config", "fastbyol.commandline", "fastbyol.atomic", "fastbyol.growing", "fastbyol.entry"),
    ("fastbyol.threads",),
    ("fastbyol.starvation",),
    ("fastbyol.signals", "fastbyol.cgroups"),
    (
        "fastbyol.kernels.batchnorm",
        "fastbyol.kernels.batchnorm_statistics",
        "fastbyol.kernels.byol_loss",
        "fastbyol.kernels.ema_loss",
        "fastbyol.kernels.lars_ema",
        "fastbyol.kernels.max_pool",
        "fastbyol.kernels.segments",
    ),
    ("fastbyol.kernels.augment", "fastbyol.kernels.blur", "fastbyol.kernels.color", "fastbyol.kernels.crop"),
    ("fastbyol.kernels", "fastbyol.kernels.dispatch", "fastbyol.kernels.reference", "fastbyol.kernels.view_params"),
)


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
    allowed = STDLIB | {"numpy", "PIL", "tqdm", "pyarrow"}
    ours = {"fastbyol.beton", "fastbyol.cgroups", "fastbyol.jpeg"}
    for imported in imports(modules()[name]):
        inside = imported in ours or imported.startswith("fastbyol.data_prep")
        assert inside or imported.split(".")[0] in allowed


def test_what_data_prep_imports_needs_no_torch() -> None:
    needed = {"fastbyol.beton": {"numpy"}, "fastbyol.cgroups": set(), "fastbyol.jpeg": {"numpy", "PIL", "simplejpeg"}}
    for name, packages in needed.items():
        found = imports(modules()[name]) - {"fastbyol.beton"}
        assert {imported.split(".")[0] for imported in found} <= STDLIB | packages


@pytest.mark.parametrize("name", [n for n in modules() if not n.startswith(("fastbyol.kernels", "fastbyol.data_prep"))])
def test_fastbyol_imports_downwards_only(name: str) -> None:
    rank = {module: level for level, row in enumerate(ORDER) for module in row}
    if name == "fastbyol":
        assert imports(modules()[name]) <= STDLIB
        return
    assert name in rank, f"{name} has no place in ORDER; give it one"
    for imported in imports(modules()[name]):
        if imported.startswith("fastbyol"):
            same_folder = imported.rpartition(".")[0] == name or name.rpartition(".")[0] == imported
            assert imported in rank, f"{name} imports {imported}, which it may not"
            assert rank[imported] > rank[name] or same_folder, (
                f"{name} imports {imported}, which stands above or beside it"
            )


def test_nothing_imports_tests_or_benchmarks() -> None:
    for path in modules().values():
        assert not {name.split(".")[0] for name in imports(path)} & {"tests", "benchmarks", "kernels", "data_prep"}
