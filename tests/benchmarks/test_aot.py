"""Laws of the machine code: every specialisation compiles for both architectures within its limits."""

from __future__ import annotations

import pytest
import triton

from benchmarks.aot import BEGIN, END, broken_limits, compile_build, table
from benchmarks.builds import BUILDS, Build
from benchmarks.document import DOCUMENT


@pytest.mark.parametrize(
    ("build", "arch"),
    [pytest.param(build, arch, id=f"{build.name}-sm_{arch}") for build in BUILDS for arch in build.archs],
)
def test_build_keeps_its_limits(build: Build, arch: int) -> None:
    assert not broken_limits(build, compile_build(build, arch))


def test_the_document_holds_every_build_and_names_its_compiler() -> None:
    assert table([]).startswith(f"Compiled by Triton {triton.__version__}.\n")
    text = DOCUMENT.read_text().split(BEGIN)[1].split(END)[0]
    assert text.strip().startswith("Compiled by Triton 3.")
    rows = [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in text.splitlines() if " sm_" in line]
    assert rows == [(build.name, f"sm_{arch}") for build in BUILDS for arch in build.archs]
