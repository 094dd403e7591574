"""No file, however damaged, crashes, hangs, floods memory or is read wrong (tests/support/fuzz.py)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# 0.6 and 1.5 ms each on a quiet core; the parts run as processes of their own and can be repeated alone.
MUTANTS, PARTS = 10_000, 2
PAYLOADS = 3_000
KINDS = {*["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA", "HEIF", "JXL"]}


def fuzz(suite: str, folder: Path, *, first: int, count: int) -> dict[str, int]:
    """Run a range of mutants; return the number of each outcome, or fail naming the mutant it ended with."""
    command = [
        sys.executable,
        "-m",
        "tests.support.fuzz",
        suite,
        str(folder),
        "--first",
        str(first),
        "--count",
        str(count),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    current = (folder / "current").read_text().strip()
    assert done.returncode == 0, f"{suite} {current} ended with {done.returncode}:\n{done.stderr[-3000:]}"
    return {kind: int(number) for kind, number in re.findall(r"(.+): (\d+)\n", done.stdout)}


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_a_damaged_beton_is_refused_or_read_right(tmp_path: Path, part: int) -> None:
    count = MUTANTS // PARTS
    outcomes = fuzz("mutants", tmp_path, first=part * count, count=count)
    assert sum(outcomes.values()) == count
    # The suite is worth its time only while it reaches all three: the header's checks, the decoder's, and neither.
    assert min(outcomes["refused"], outcomes["image error"], outcomes["read"]) > count // 10


@pytest.mark.slow
def test_a_damaged_image_file_is_refused_or_stored_whole(tmp_path: Path) -> None:
    outcomes = fuzz("payloads", tmp_path, first=0, count=PAYLOADS)
    assert sum(outcomes.values()) == PAYLOADS
    assert {kind.split()[0] for kind in outcomes} == KINDS
