"""The law of flat memory: 60 000 samples need no more than a tenth of them do, but for 48 bytes of index a sample."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.support.layouts import packed

ROOT = Path(__file__).parents[2]
SAMPLES = 60_000
FOLDERS = 200
# The index of 54 000 samples takes 2.5, and a page of zeros at the end may take 8. Reading has taken up to 1.4, for 200
# folders; an object kept for each sample takes at least 3.
CONVERTING_MIB, READING_MIB = 14, 2.5
MAPPED_MIB = 5  # also counts the pages of the file around those in use; 2.8 were seen, and 14.8 if none is given back


def smallest() -> bytes:
    """Make a JPEG that takes one block of an archive."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 100, 50)).save(stream, "JPEG", optimize=True)
    assert stream.tell() <= 512
    return stream.getvalue()


IMAGE = smallest()

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


def linked(path: Path, count: int) -> Path:
    """Make a folder of links to one image; a file system may allow 65 000 to each."""
    path.mkdir(parents=True)
    for number in range(count):
        if number % 50_000 == 0:
            image = path / f"{number}.jpg"
            image.write_bytes(IMAGE)
        else:
            os.link(image, path / f"{number}.jpg")
    return path


def class_folders(path: Path) -> Path:
    """Make folders that are links to one folder."""
    one = linked(path.with_name("one"), SAMPLES // FOLDERS)
    path.mkdir()
    for label in range(FOLDERS):
        (path / f"{label:03}").symlink_to(one)
    return path


def flat_folder(path: Path) -> Path:
    """Make one folder; its names are all in memory before the first sample comes."""
    return linked(path, SAMPLES)


def archive(path: Path) -> Path:
    """Make a .tar of class folders."""
    members = repeated({f"{number}/{number}.jpg": IMAGE for number in range(1000)})
    with path.open("wb") as stream:
        stream.writelines([members] * (SAMPLES // 1000))
        stream.write(bytes(1024))
    return path


def tar_of_tars(path: Path) -> Path:
    """Make a .tar of one .tar a class."""
    inner = packed({f"{number}.jpg": IMAGE for number in range(SAMPLES // FOLDERS)})
    with path.open("wb") as stream:
        for label in range(FOLDERS):
            stream.write(repeated({f"{label:03}.tar": inner}))
        stream.write(bytes(1024))
    return path


def shards(path: Path) -> Path:
    """Make one shard, and a pattern that names it for every thousand; labels would double the time."""
    path.mkdir()
    (path / "0.tar").write_bytes(packed({f"{number}.jpg": IMAGE for number in range(1000)}))
    return path / f"{{{','.join('0' * (SAMPLES // 1000))}}}.tar"


def repeated(members: dict[str, bytes]) -> bytes:
    """Return an archive without the mark of its end, to be written any number of times."""
    return packed(members)[: sum(512 + -(-len(data) // 512) * 512 for data in members.values())]


def table(path: Path) -> Path:
    """Make a parquet file whose one row group holds all images."""
    pq.write_table(rows(), path, row_group_size=SAMPLES, use_dictionary=False)
    return path


def rows() -> pa.Table:
    """Make a table of all images."""
    of = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = pa.array([{"bytes": IMAGE, "path": None}] * SAMPLES, of)
    return pa.table({"image": column, "label": [number % 200 for number in range(SAMPLES)]})


def stream(path: Path) -> Path:
    """Make an arrow file whose one batch holds all images, as no library would."""
    content = rows()
    with pa.ipc.new_stream(str(path), content.schema) as writer:
        writer.write_table(content)
    return path


def growth_mib(*places: Path) -> float:
    """Read, or convert, all samples in a process of its own; return how much its peak grew after the first tenth."""
    command = [sys.executable, "-c", PROBE, str(SAMPLES // 10), *map(str, places)]
    count, growth = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert int(count) == SAMPLES
    return float(growth)


@pytest.mark.slow
@pytest.mark.parametrize(
    "lay_out", [class_folders, flat_folder, tar_of_tars, shards, table], ids=lambda lay_out: lay_out.__name__
)
def test_reading_a_source_takes_flat_memory(tmp_path: Path, lay_out: Callable[[Path], Path]) -> None:
    assert growth_mib(lay_out(tmp_path / "source")) < READING_MIB


@pytest.mark.slow
def test_reading_an_arrow_file_keeps_little_of_it_mapped(tmp_path: Path) -> None:
    path = stream(tmp_path / "source.arrow")
    assert growth_mib(path) < MAPPED_MIB < path.stat().st_size / 2**20 / 3


@pytest.mark.slow
def test_converting_an_archive_takes_flat_memory(tmp_path: Path) -> None:
    assert growth_mib(archive(tmp_path / "source.tar"), tmp_path / "a.beton") < CONVERTING_MIB
