"""What the pickles of CIFAR hold, read without running anything: dictionaries, lists, bytes, numbers, numpy's bytes."""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbyol.data_prep.sources.base import SourceError

ERRORS = (
    pickle.UnpicklingError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    EOFError,
    OverflowError,
    MemoryError,
    RecursionError,
)
PICKLE = b"\x80\x02"  # at the start
PUTS = ("PUT", "BINPUT", "LONG_BINPUT")


class _Built:
    """What stands for an object of numpy: the arguments it would be made of, and its state."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


KNOWN = {(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")} | {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


TUPLES_MAX = 1000  # a file of CIFAR has some ten


class _Unpickler(pickle.Unpickler):
    """An unpickler that knows no class but the stand-in, and so can call nothing else."""

    def find_class(self, module: str, name: str) -> type[_Built]:
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}; wanted arrays of numpy alone")
        return _Built


def read_pickle(data: bytes, place: Path) -> dict[bytes, Any]:
    """Return the dictionary in a pickle of Python 2; raise SourceError for anything that CIFAR's have not."""
    try:
        tuples = 0
        for code, argument, _ in pickletools.genops(data):
            tuples += code.name.startswith("TUPLE")
            if tuples > TUPLES_MAX:  # tuples in tuples may be deeper than Python's stack
                raise pickle.UnpicklingError("too many tuples")
            if code.name in PUTS and (argument or 0) > len(data):  # room is made for as many objects
                raise pickle.UnpicklingError(f"its object has the number {argument}")
        found = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except ERRORS as error:
        raise SourceError(f"{place}: no pickle of CIFAR, or damaged: {str(error)[:200]}; download it again") from error
    if not isinstance(found, dict):
        raise SourceError(f"{place}: its pickle holds no dictionary; give a file of CIFAR")
    return found


def bytes_array(found: object) -> NDArray[np.uint8] | None:
    """Return the array [rows, columns] of bytes that an object stands for; None if it stands for none."""
    match found:
        case _Built(state=(_, (int(rows), int(columns)), _Built(arguments=(b"u1", *_)), bool(is_fortran), bytes(data))):
            if min(rows, columns) >= 0 and rows * columns == len(data):
                return np.frombuffer(data, np.uint8).reshape(rows, columns, order="F" if is_fortran else "C")
    return None
