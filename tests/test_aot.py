"""Laws of the machine code: every specialisation compiles for both architectures within its limits."""

from __future__ import annotations

import pytest

from benchmarks.aot import ARCHS, Build, compile_build, faults
from benchmarks.builds import BUILDS


@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: f"sm_{arch}")
@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.name)
def test_build_keeps_its_limits(build: Build, arch: int) -> None:
    assert not faults(build, compile_build(build, arch))
