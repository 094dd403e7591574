"""Laws of timm and torchvision that cannot be imported: what is missing, and what does not fit, each have a remedy."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fastbyol.config import EncoderConfig
from fastbyol.errors import ConfigError
from fastbyol.model.libraries import import_library
from fastbyol.model.parts import build_encoder
from fastbyol.weights import read

UNFIT = "raise RuntimeError('operator torchvision::nms does not exist\\nand more of it')"


def install(folder: Path, package: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a package of one file on the path, in place of any other of that name."""
    for name in list(sys.modules):
        if name.partition(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    (folder / package).mkdir()
    (folder / package / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(folder)


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_a_missing_package_is_to_be_installed(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs {package}, which .*; pip install 'fastbyol\[{package}\]'$"):
        build_encoder(EncoderConfig(f"{package}:resnet18"), seed=0)


@pytest.mark.parametrize("package", ["torchvision", "timm"])
@pytest.mark.parametrize(
    ("build", "how"),
    [
        ("2.13.0+cpu", "2.13.0+cpu --index-url https://download.pytorch.org/whl/cpu"),
        ("2.13.0+cu130", "2.13.0+cu130 --index-url https://download.pytorch.org/whl/cu130"),
        ("2.14.0a0+git1234", None),
    ],
)
def test_a_torchvision_for_another_torch_is_to_be_replaced(
    build: str, how: str | None, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "torchvision", UNFIT, monkeypatch)
    install(tmp_path, "timm", "import torchvision", monkeypatch)
    monkeypatch.setattr(torch, "__version__", build)
    commands = "" if how is None else f": pip uninstall torchvision; pip install torchvision torch=={how}"
    wanted = (
        "which cannot be imported (operator torchvision::nms does not exist); install the build of torchvision for "
        f"torch {build}, which is installed{commands}"
    )
    for use in (
        lambda: build_encoder(EncoderConfig(f"{package}:resnet18"), seed=0),
        lambda: read(f"{package}:resnet18"),
    ):
        with pytest.raises(ConfigError) as raised:
            use()
        assert str(raised.value).endswith(wanted)


def test_another_package_that_does_not_fit_is_not_to_be_installed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "timm", "from fastbyol.errors import nothing_of_this_name", monkeypatch)
    with pytest.raises(ConfigError, match=r"nothing_of_this_name.*timm is installed, .*pip check may name that$"):
        import_library("timm", claim="it needs timm")
