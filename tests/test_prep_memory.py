"""The law of flat memory: 200 000 samples need no more than a tenth of them do, but for 48 bytes of index a sample."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.layouts import draw, packed

ROOT = Path(__file__).parent.parent
SAMPLES = 200_000
SHARD_SAMPLES = 50_000  # two files each, and read twice: four times the headers
IMAGE = draw(0, side=8)
# Measured: 9.3 and .5. The index of 180 000 samples takes 8.2, and a page of zeros at the end may take 8.
CONVERTING_MIB, READING_MIB = 24, 4

# Runs on its own, so that the peak is its own: argv is the number of early samples, the source, and the .beton if it is
# to be converted.
PROBE = """
import sys
from pathlib import Path
from fastbyol.data_prep.convert import convert
from fastbyol.data_prep.settings import Settings
from fastbyol.data_prep.sources import open_source

class Watched:
    def __init__(self, source):
        self.__dict__.update(vars(source))
        self.source, self.early = source, 0
    def __iter__(self):
        for number, sample in enumerate(self.source):
            if number == int(sys.argv[1]):
                self.early = peak_mib()
            yield sample

def peak_mib():  # getrusage would say the peak of the process that started this one, where that was higher
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

source = Watched(open_source(sys.argv[2]))
if len(sys.argv) > 3:
    count = convert(source, Path(sys.argv[3]), Settings("passthrough"), workers=2).written
else:
    count = sum(1 for sample in source if sample.read())
print(count, peak_mib() - source.early)
"""


def class_folders(path: Path) -> Path:
    """Make 200 folders of 1000 links to one image each."""
    for label in range(200):
        folder = path / f"{label:03}"
        folder.mkdir(parents=True)
        (folder / "0.jpg").write_bytes(IMAGE)
        for number in range(1, SAMPLES // 200):
            os.link(folder / "0.jpg", folder / f"{number}.jpg")
    return path


def archive(path: Path) -> Path:
    """Make a compressed .tar of class folders."""
    return repeat(path, {f"{number}/{number}.jpg": IMAGE for number in range(1000)}, times=SAMPLES // 1000)


def shards(path: Path) -> Path:
    """Make a compressed shard of labelled samples, for a pattern that names it twice."""
    members: dict[str, bytes] = {}
    for number in range(500):
        members |= {f"{number}.jpg": IMAGE, f"{number}.cls": b"%d" % number}
    path.mkdir()
    repeat(path / "0.tar", members, times=SHARD_SAMPLES // 1000)
    return path / "{0,0}.tar"


def repeat(path: Path, members: dict[str, bytes], *, times: int) -> Path:
    """Write an archive that holds the members that many times over."""
    part = packed(members)
    part = part[: len(part.rstrip(b"\0")) // 512 * 512 + 512]  # without the end mark
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.writelines([part] * times)
        stream.write(bytes(1024))
    return path


def table(path: Path) -> Path:
    """Make a parquet file whose one row group holds all images."""
    column = pa.array(
        [{"bytes": IMAGE, "path": None}] * SAMPLES, pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    labels = pa.array([number % 200 for number in range(SAMPLES)])
    pq.write_table(pa.table({"image": column, "label": labels}), path, row_group_size=SAMPLES, use_dictionary=False)
    return path


def growth_mib(*places: Path, samples: int = SAMPLES) -> float:
    """Read, or convert, all samples in a process of its own; return how much its peak grew after the first tenth."""
    command = [sys.executable, "-c", PROBE, str(samples // 10), *map(str, places)]
    count, growth = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert int(count) == samples
    return float(growth)


@pytest.mark.slow
@pytest.mark.parametrize("lay_out", [class_folders, table], ids=lambda lay_out: lay_out.__name__)
def test_reading_a_source_takes_flat_memory(tmp_path: Path, lay_out: Callable[[Path], Path]) -> None:
    assert growth_mib(lay_out(tmp_path / "source")) < READING_MIB


@pytest.mark.slow
def test_reading_shards_takes_flat_memory(tmp_path: Path) -> None:
    assert growth_mib(shards(tmp_path / "source"), samples=SHARD_SAMPLES) < READING_MIB


@pytest.mark.slow
def test_converting_an_archive_takes_flat_memory(tmp_path: Path) -> None:
    assert growth_mib(archive(tmp_path / "source.tar"), tmp_path / "a.beton") < CONVERTING_MIB
