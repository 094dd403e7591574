"""CIFAR's pickles for tests: the layout of Python 2, in which texts, keys and arrays are strings of bytes."""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tests.support.layouts import lay_out

NAMES_10 = [b"airplane", b"automobile", b"bird", b"cat", b"deer", b"dog", b"frog", b"horse", b"ship", b"truck"]
META_10 = {b"num_cases_per_batch": 10000, b"label_names": NAMES_10, b"num_vis": 3072}
META_100 = {b"fine_label_names": [b"apple", b"fish", b"baby"], b"coarse_label_names": [b"fruit", b"animals"]}
ROWS = 4  # in a file of these tests


class _Python2Pickler(pickle._Pickler):  # type: ignore[misc]
    """A pickler that writes bytes and texts as Python 2 wrote its strings."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)

    def save_string(self, value: bytes | str) -> None:
        data = value.encode() if isinstance(value, str) else value
        short = len(data) < 256
        self.write(
            (pickle.SHORT_BINSTRING + bytes([len(data)]) if short else b"T" + struct.pack("<i", len(data))) + data
        )
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_string


def pickled(content: object) -> bytes:
    """Return what Python 2 with numpy 1 would write."""
    stream = io.BytesIO()
    _Python2Pickler(stream, protocol=2).dump(content)
    return stream.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def pixels(seed: int, rows: int = ROWS) -> np.ndarray[Any, Any]:
    """Draw images [rows, 3072], all of a row's red first."""
    return np.random.default_rng(seed).integers(0, 256, (rows, 3072)).astype(np.uint8)


def batch_10(seed: int, **changed: Any) -> dict[bytes, Any]:
    """Make a file of images of CIFAR-10; changed: its other values."""
    facts = {
        b"batch_label": b"training batch 1 of 5",
        b"labels": [(seed + row) % 10 for row in range(ROWS)],
        b"data": pixels(seed),
        b"filenames": [b"frog_s_%06d.png" % (100 * seed + row) for row in range(ROWS)],
    }
    return facts | {key.encode(): value for key, value in changed.items()}


def batch_100(seed: int) -> dict[bytes, Any]:
    """Make a file of images of CIFAR-100."""
    facts = batch_10(seed)
    del facts[b"labels"]
    return facts | {b"fine_labels": [0, 1, 2, 1], b"coarse_labels": [0, 1, 1, 1]}


def files_10() -> dict[str, bytes]:
    """Return all files of CIFAR-10's folder."""
    batches = {f"data_batch_{number}": batch_10(number) for number in range(1, 6)} | {"test_batch": batch_10(6)}
    files = {"batches.meta": META_10} | batches
    return {name: pickled(content) for name, content in files.items()} | {"readme.html": b"<html>"}


def folder_10(folder: Path) -> Path:
    """Lay out CIFAR-10's folder."""
    return lay_out(folder, files_10())
