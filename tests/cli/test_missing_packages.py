"""Laws of an environment without simplejpeg and the optional packages: everything imports, and a run finishes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import PATIENCE_S

ROOT = Path(__file__).parents[2]
NAMED = (
    "simplejpeg",
    "pyarrow",
    "pillow_heif",
    "pillow_jxl",
    "fsspec",
    "aiohttp",
    "ffcv",
    "nvidia.dali",
    "nvidia.cu13",
    "tensorboard",
    "wandb",
    "onnxscript",
    "matplotlib",
    "apex",
)
OTHERS = ("onnx", "hypothesis", "psutil", "sklearn", "numba", "xdist", "torchvision", "timm")  # of tests and benchmarks
OPTIONAL = (*NAMED, *OTHERS)  # as imported
NAMES = {
    "nvidia-dali-cuda130": "nvidia.dali",
    "nvidia-nvjpeg": "nvidia.cu13",
    "scikit-learn": "sklearn",
    "pillow-heif": "pillow_heif",
    "pillow-jxl-plugin": "pillow_jxl",
    "pytest-xdist": "xdist",
}  # a distribution's, where its import differs
DOCUMENTATION = {"mkdocs", "mkdocs-material", "mkdocstrings-python"}  # of make docs
TOOLS = {"pytest", "build", "setuptools", "ruff", "mypy", "pre-commit", "types-tqdm"}  # nothing of ours imports them
NEEDED = {"torch", "jinja2", "triton", "numpy", "pillow", "tqdm", "safetensors", "tomli"}  # tomli by Python 3.10
NEEDING = {  # modules that exist for one package
    "fastbyol.loaders.ffcv": ("ffcv", "numba"),
    "fastbyol.loaders.dali": ("nvidia.dali",),
    "fastbyol.loaders.dali_crop": ("nvidia.dali",),
    **{f"fastbyol.data_prep.sources.{name}": ("pyarrow",) for name in ("arrow", "columns", "parquet", "tables")},
}
HIDE = """
import os, sys

class Hiding:
    '''A finder that knows nothing of some packages and leaves the rest to another finder.'''
    def __init__(self, finder, names):
        self.finder, self.names = finder, names
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        if any(name == hidden or name.startswith(hidden + ".") for hidden in self.names):
            return None
        return self.finder.find_spec(name, path, target)

def forget(names):
    for name in list(sys.modules):
        if any(name == each or name.startswith(each + ".") for each in names):
            del sys.modules[name]

def hide(names):
    forget(names)
    sys.meta_path[:] = [Hiding(finder, names) for finder in sys.meta_path]
"""
IMPORTS = (
    HIDE
    + """
import importlib, json, os, pkgutil, traceback

packages, needing = json.loads(sys.argv[1]), json.loads(sys.argv[2])

def import_all(hidden):
    import fastbyol
    for module in pkgutil.walk_packages(fastbyol.__path__, "fastbyol."):
        if not any(importlib.util.find_spec(need.partition(".")[0]) is None or need in hidden
                   for need in needing.get(module.name, ())):
            importlib.import_module(module.name)

import_all([])  # so that the children have torch and the packages that are not hidden
for hidden in packages:
    child = os.fork()
    if child == 0:
        try:
            forget(["fastbyol"])
            hide(hidden)
            import_all(hidden)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit("without " + ", ".join(hidden))
"""
)
CHAIN = (
    HIDE
    + """
from pathlib import Path
hide(sys.argv[2].split(","))
os.chdir(sys.argv[1])
import numpy as np
from PIL import Image

rng = np.random.default_rng(0)
for split, count in (("train", 24), ("val", 8)):
    for number in range(count):
        path = Path(split, "ab"[number % 2], f"{number}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)

from fastbyol.cli import embed, eval as evaluation, train
from fastbyol.data_prep import cli

files = ["--train=train.beton", "--val=val.beton"]
data = ["--data=train.beton", "--val=val.beton"]
for main, words in (
    (cli.main, ["write", "train", "train.beton"]),
    (cli.main, ["write", "val", "val.beton", "--classes-from=train.beton", "--mode=passthrough"]),
    (cli.main, ["verify", "train.beton"]),
    (cli.main, ["info", "val.beton"]),
    (train.main, ["demo", *data, "--out=run", "--epochs=2", "--warmup-epochs=1", "--batch-size=8", "--device=cpu"]),
    (evaluation.main, ["knn", "run", *files, "--k=3", "--device=cpu"]),
    (embed.main, ["run", "val.beton", "--out=val.npz", "--device=cpu"]),
):
    print(words[0], file=sys.stderr)
    if status := main(words):
        sys.exit(f"{words} ended with {status}")
"""
)


def started(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the folder of the project, with more environment variables."""
    command, env = [sys.executable, *words], os.environ | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=PATIENCE_S)


def test_every_dependency_is_needed_or_tried_without() -> None:
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    names = {re.split(r"[<>=\[]", name)[0] for name in listed}
    assert {NAMES.get(name, name) for name in names - NEEDED - TOOLS - DOCUMENTATION} <= set(OPTIONAL)


@pytest.mark.slow
def test_everything_imports_without_any_one_optional_package() -> None:
    ended = started("-c", IMPORTS, json.dumps([*([name] for name in NAMED), OTHERS]), json.dumps(NEEDING))
    assert ended.returncode == 0, ended.stderr


def test_a_run_comes_from_images_to_its_scores_without_any_optional_package(tmp_path: Path) -> None:
    ended = started("-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{CHAIN}", str(tmp_path), ",".join(OPTIONAL))
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("pip install simplejpeg") == 1, ended.stderr
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    assert json.loads((tmp_path / "run" / "result.json").read_text())["epochs"] == 2.0
    assert len(list((tmp_path / "run" / "scores").iterdir())) == 1


def test_gpu_and_kernel_tests_and_the_benchmarks_load_without_any_optional_package() -> None:
    words = ["-q", "--collect-only", "-p", "no:cacheprovider", "tests/kernels", "tests/gpu"]
    script = f"""{HIDE}
hide({OPTIONAL!r})
import pytest, runpy
if status := pytest.main({words}):
    sys.exit(status)
sys.argv = ["bench.py", "--help"]
runpy.run_path("benchmarks/bench.py", run_name="__main__")
"""
    autoload = "PYTEST_DISABLE_PLUGIN_AUTOLOAD"  # hypothesis's plugin is listed by its metadata, which stays
    ended = started("-c", script, **{autoload: "1"})
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr


@pytest.mark.parametrize(
    ("hidden", "address", "package"),
    [
        ("fsspec", "memory://bucket/x", "fsspec"),
        ("fsspec", "https://127.0.0.1:9/x", "'fastbyol[remote]'"),
        ("aiohttp", "https://127.0.0.1:9/x", "'fastbyol[remote]'"),
        ("s3fs", "s3://bucket/x", "s3fs"),
    ],
)
def test_an_address_names_the_package_that_it_needs(tmp_path: Path, hidden: str, address: str, package: str) -> None:
    script = f"""{HIDE}
hide([{hidden!r}])
from fastbyol.data_prep import cli
assert cli.main(["write", {address!r}, {str(tmp_path / "o.beton")!r}]) == 2
"""
    ended = started("-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{script}")
    assert ended.returncode == 0, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith(
        f"fastbyol-prep: error: {address}: {address.partition(':')[0]}:// needs a package that is not"
    )
    assert line.endswith(f"pip install {package}")


@pytest.mark.slow
def test_without_pillow_a_command_says_in_one_line_what_to_install(tmp_path: Path) -> None:
    script = f"""{HIDE}
hide(["PIL", "simplejpeg"])
os.chdir({str(tmp_path)!r})
from fastbyol.cli import eval as evaluation, train
from fastbyol.data_prep import cli
for main, words in (
    (train.main, ["demo", "--out=run"]),
    (evaluation.main, ["export", "run", "out"]),
    (cli.main, ["demo", "data"]),
):
    assert main(words) == 2
"""
    ended = started("-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{script}")
    assert ended.returncode == 0, ended.stderr
    lines = ended.stderr.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["fastbyol-train", "fastbyol-eval", "fastbyol-prep"]
    assert all("pip install pillow" in line for line in lines)
