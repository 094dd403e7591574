"""Laws of files that grow: whole records in order, whatever the disk refuses in between."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastbyol.storage.files import RecordFile
from tests.support.full_disk import files_end_at

RECORDS = [bytes([65 + number]) * 60 + b"\n" for number in range(6)]


def test_a_refused_record_leaves_no_part_and_comes_later_in_its_place(tmp_path: Path) -> None:
    said: list[str] = []
    file = RecordFile(tmp_path / "rows", warn=said.append)
    with files_end_at(100):
        for count, record in enumerate(RECORDS[:4]):
            file.append(record)
            assert (tmp_path / "rows").read_bytes() == RECORDS[0]
            assert file.pending == count
    assert len(said) == 1
    assert "rows cannot be written" in said[0]
    file.append(RECORDS[4])
    assert file.pending == 0
    assert (tmp_path / "rows").read_bytes() == b"".join(RECORDS[:5])
    with files_end_at(310):
        file.append(RECORDS[5])
    assert len(said) == 2  # the disk had been well in between
    file.close()
    assert (tmp_path / "rows").read_bytes() == b"".join(RECORDS)
    assert len(said) == 2


def test_what_the_disk_never_took_is_told_at_the_end(tmp_path: Path) -> None:
    said: list[str] = []
    file = RecordFile(tmp_path / "rows", warn=said.append)
    with files_end_at(100):
        for record in RECORDS:
            file.append(record)
        file.close()
    assert "lacks its last 5 rows" in said[-1]
    assert (tmp_path / "rows").read_bytes() == RECORDS[0]


def test_keep_cuts_the_file_and_goes_on_from_there(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(RECORDS[0] + RECORDS[1] + RECORDS[2][:10])
    file = RecordFile(tmp_path / "rows", warn=pytest.fail, keep_bytes=len(RECORDS[0]))
    file.append(RECORDS[3])
    file.close()
    assert (tmp_path / "rows").read_bytes() == RECORDS[0] + RECORDS[3]


def test_a_file_that_cannot_be_closed_is_a_warning(tmp_path: Path) -> None:
    said: list[str] = []
    file = RecordFile(tmp_path / "rows", warn=said.append)
    file.append(RECORDS[0])
    os.close(file._file)  # so that the file's own close is refused, as a network's file system may refuse it
    file.close()
    assert len(said) == 1
    assert "rows may lack its last rows" in said[0]


FILL = """
import os, sys
from pathlib import Path
from fastbyol.storage.files import RecordFile
folder = Path(sys.argv[1])
said = []
file = RecordFile(folder / "rows", warn=said.append)
ballast = os.open(folder / "ballast", os.O_WRONLY | os.O_CREAT)
try:
    while True:
        os.write(ballast, bytes(4096))
except OSError as error:
    assert error.errno == 28, error
for number in range(300):
    file.append(b"%04d" % number + b"x" * 95 + b"\\n")
assert file.pending and len(said) == 1, (file.pending, said)
os.ftruncate(ballast, 0)
file.append(b"last\\n")
rows = (folder / "rows").read_bytes().splitlines()
assert [int(row[:4]) for row in rows[:-1]] == list(range(300)) and rows[-1] == b"last", len(rows)
print("held")
"""


def test_a_disk_that_is_really_full_costs_nothing_once_there_is_room(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=128k none {tmp_path}"
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*inside, mount], check=False, capture_output=True).returncode:
        pytest.skip("no file system of one's own may be mounted here")
    ran = subprocess.run(
        [*inside, f'{mount} && exec "$@"', "sh", sys.executable, "-c", FILL, str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert ran.stdout == "held\n", ran.stderr
