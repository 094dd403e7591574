"""Laws of control groups: every one above a process may leave it fewer cores."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastbyol.system.limits import available_cores, core_quotas, groups


def test_a_process_has_one_core_or_more() -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/job/step\n", {"job/cpu.max": "150000 100000\n", "job/step/cpu.max": "max 100000\n"}, [1.5]),
        ("0::/job/step\n", {"cpu.max": "800000 100000\n", "job/step/cpu.max": "50000 100000\n"}, [0.5, 8.0]),
        ("0::/../elsewhere\n", {"cpu.max": "200000 100000\n"}, [2.0]),
        (
            "4:cpu,cpuacct:/docker/one\n0::/\n",
            {"cpu/docker/cpu.cfs_quota_us": "300000\n", "cpu/docker/cpu.cfs_period_us": "100000\n"},
            [3.0],
        ),
        (
            "4:cpu:/docker\n",
            {"cpu/docker/cpu.cfs_quota_us": "-1\n", "cpu/docker/cpu.cfs_period_us": "100000\n"},
            [],
        ),
        ("", {}, []),
    ],
)
def test_every_group_above_a_process_may_limit_its_cores(
    tmp_path: Path, own: str, files: dict[str, str], cores: list[float]
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "own").write_text(own)
    found = groups("cpu", root=tmp_path, own=tmp_path / "own")
    assert [quota for group, version in found for quota in core_quotas(group, version=version)] == cores
