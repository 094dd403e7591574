"""The output folder of a call: at most eight files of 16 MiB, written as things happen.

rows.jsonl   what was measured, a row each           log.txt       everything that was printed, part by part
runs.tar.gz  configs, metrics, results, profiles     smi.csv       the GPU's load, memory, clocks, power, each second
summary.md   the tables, measured beside predicted   failed.txt    tests that failed, for the next call
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FILES_MAX = 8
FILE_BYTES = 16 * 2**20
PART_HEAD_BYTES, PART_TAIL_BYTES = 3 * 2**18, 2**18  # of the log: no part crowds the others out
KEPT = (".json", ".jsonl", ".txt", ".html", ".md", ".csv", ".log")  # of a run folder; no weights, no images
SUMMARY_BYTES = 2**20


class _Tail:
    """The last PART_TAIL_BYTES of a part's lines."""

    def __init__(self) -> None:
        self.lines: deque[bytes] = deque()
        self._bytes = 0

    def add(self, line: bytes) -> None:
        """Append a line and forget the oldest that are too much."""
        self.lines.append(line[:PART_TAIL_BYTES])
        self._bytes += len(self.lines[-1])
        while self._bytes > PART_TAIL_BYTES:
            self._bytes -= len(self.lines.popleft())


class Output:
    """A folder that what is measured goes to. Raises OSError where it cannot be written to."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.rows, self.smi = folder / "rows.jsonl", folder / "smi.csv"
        self.summary, self.failed = folder / "summary.md", folder / "failed.txt"
        self.runs = folder / "runs.tar.gz"
        for path in (self.rows, self.smi, self.summary, self.failed, self.runs):
            path.unlink(missing_ok=True)
        self._log = (folder / "log.txt").open("wb", buffering=0)
        self._lock = threading.Lock()
        self._written: dict[str, int] = {}
        self._tails: dict[str, _Tail] = {}
        self._began = time.monotonic()
        self.faults: list[str] = []

    def say(self, part: str, text: str) -> None:
        """Write a line of a part to the log; of a part's flood the first and the last are kept."""
        line = f"{time.monotonic() - self._began:6.1f} {part} | {text}\n".encode()
        with self._lock:
            if self._written.get(part, 0) + len(line) <= PART_HEAD_BYTES:
                self._written[part] = self._written.get(part, 0) + len(line)
                self._write(line)
                return
            self._tails.setdefault(part, _Tail()).add(line)

    def end(self, part: str) -> None:
        """Write the last lines of a part that printed too much."""
        with self._lock:
            tail = self._tails.pop(part, None)
            if tail is not None:
                limit = f"past {PART_HEAD_BYTES} bytes, lines are left out here; the part's last ones follow"
                self._write(b"".join([f"{part} | {limit}\n".encode(), *tail.lines]))

    def _write(self, line: bytes) -> None:
        try:
            self._log.write(line)
        except OSError as error:  # a full disk must not block the part that prints
            self._fault(f"log.txt could not be written: {error}")

    def _fault(self, text: str) -> None:
        if text not in self.faults:
            self.faults.append(text)
            print(text, file=sys.stderr, flush=True)

    def add_row(self, row: Mapping[str, Any]) -> None:
        """Append a row."""
        try:
            append_row(self.rows, row)
        except OSError as error:
            self._fault(f"rows.jsonl could not be written: {error}")

    def read_rows(self) -> list[dict[str, Any]]:
        """Read all rows that are whole; a part that was killed may have left half of one."""
        rows = []
        for line in self.rows.read_text().splitlines() if self.rows.exists() else ():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                self._fault(f"rows.jsonl holds half a row: {line[:80]}")
        return rows

    def pack_runs(self, runs: Path) -> None:
        """Write runs.tar.gz anew: what is small of every run folder; the largest files stay out past FILE_BYTES."""
        files = sorted((path for path in runs.rglob("*") if _is_kept(path)), key=lambda path: path.stat().st_size)
        left_out: list[str] = []
        try:
            while len(packed := _packed(files, runs, left_out)) > FILE_BYTES:
                largest = files.pop()
                left_out.append(f"{largest.relative_to(runs)}: {largest.stat().st_size} bytes")
            partial = self.runs.with_suffix(".part")
            partial.write_bytes(packed)
            partial.replace(self.runs)
        except OSError as error:
            self._fault(f"runs.tar.gz could not be written: {error}")
        if left_out:
            self._fault(f"left out of runs.tar.gz, which would pass {FILE_BYTES} bytes: {', '.join(left_out)}")

    def write_summary(self, text: str) -> None:
        """Write summary.md anew."""
        data = text.encode()
        if len(data) > SUMMARY_BYTES:
            data = data[:SUMMARY_BYTES] + f"\n\nshortened: {len(data)} bytes\n".encode()
        try:
            self.summary.write_bytes(data)
        except OSError as error:
            self._fault(f"summary.md could not be written: {error}")


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row in one write, so that parts beside one another do not mix theirs."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def _is_kept(path: Path) -> bool:
    return path.is_file() and path.suffix in KEPT and "checkpoints" not in path.parts


def _packed(files: Sequence[Path], root: Path, left_out: Sequence[str]) -> bytes:
    """Pack files, and a list of those left out, in memory."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz", compresslevel=5) as archive:
        for path in files:
            archive.add(path, str(path.relative_to(root)))
        if left_out:
            text = "".join(f"{line}\n" for line in left_out).encode()
            member = tarfile.TarInfo("left-out.txt")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    return made.getvalue()
