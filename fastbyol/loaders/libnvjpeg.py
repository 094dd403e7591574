"""What is called of NVIDIA's library nvJPEG, declared for ctypes as nvjpeg.h has it, and where the library is found."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Iterator
from ctypes import POINTER, c_int, c_size_t, c_uint, c_void_p
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch

from fastbyol.errors import ConfigError

MAX_COMPONENT = 4
BACKEND_HARDWARE = 3
OUTPUT_RGBI = 5  # rows of RGB, RGB, ...
UPSAMPLING_WITH_INTERPOLATION = 1 << 5  # of chroma, as libjpeg-turbo does it
MAJOR_VERSION, MINOR_VERSION, PATCH_LEVEL = 0, 1, 2  # libraryPropertyType, of CUDA's library_types.h
MAJORS = (13, 12)  # of the library; the parts declared here are the same in both


class Status(IntEnum):
    """What every function returns."""

    SUCCESS = 0
    NOT_INITIALIZED = 1
    INVALID_PARAMETER = 2
    BAD_JPEG = 3
    JPEG_NOT_SUPPORTED = 4
    ALLOCATOR_FAILURE = 5
    EXECUTION_FAILED = 6
    ARCH_MISMATCH = 7
    INTERNAL_ERROR = 8
    IMPLEMENTATION_NOT_SUPPORTED = 9
    INCOMPLETE_BITSTREAM = 10


class Image(ctypes.Structure):
    """Where an image is written: the address of each channel, and the bytes from a row to the next."""

    _fields_ = (("channel", c_void_p * MAX_COMPONENT), ("pitch", c_size_t * MAX_COMPONENT))


# Handles, device pointers and arrays are void pointers. Functions that take less time than handing the interpreter's
# lock to another thread and waiting for it to come back keep it.
QUICK = {
    "nvjpegGetProperty": (c_int, POINTER(c_int)),
    "nvjpegGetHardwareDecoderInfo": (c_void_p, POINTER(c_uint), POINTER(c_uint)),
    "nvjpegJpegStreamParseHeader": (c_void_p, c_void_p, c_size_t, c_void_p),
    "nvjpegJpegStreamGetFrameDimensions": (c_void_p, POINTER(c_uint), POINTER(c_uint)),
    "nvjpegDecodeBatchedSupported": (c_void_p, c_void_p, POINTER(c_int)),
}
SLOW = {
    "nvjpegCreateEx": (c_int, c_void_p, c_void_p, c_uint, POINTER(c_void_p)),
    "nvjpegDestroy": (c_void_p,),
    "nvjpegJpegStateCreate": (c_void_p, POINTER(c_void_p)),
    "nvjpegJpegStateDestroy": (c_void_p,),
    "nvjpegJpegStreamCreate": (c_void_p, POINTER(c_void_p)),
    "nvjpegJpegStreamDestroy": (c_void_p,),
    "nvjpegDecodeBatchedInitialize": (c_void_p, c_void_p, c_int, c_int, c_int),
    "nvjpegDecodeBatched": (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
}


class NvJpegError(RuntimeError):
    """A function of nvJPEG did not succeed."""

    def __init__(self, function: str, status: int) -> None:
        known = status in Status._value2member_map_
        super().__init__(f"{function} returned {status}" + (f" ({Status(status).name})" if known else ""))
        self.status = status


class Library:
    """nvJPEG's functions by name, as attributes; each raises NvJpegError unless it returns SUCCESS.

    Raises OSError where the file cannot be loaded, and AttributeError where it lacks a function.
    """

    def __init__(self, path: str | Path) -> None:
        quick, slow = ctypes.PyDLL(str(path)), ctypes.CDLL(str(path))
        self._functions: dict[str, Callable[..., int]] = {
            **{name: declare(quick[name], name, types) for name, types in QUICK.items()},
            **{name: declare(slow[name], name, types) for name, types in SLOW.items()},
        }

    def __getattr__(self, name: str) -> Callable[..., int]:
        return self._functions[name]

    def version(self) -> str:
        """Return the version of the library, such as 13.3.2."""
        number, parts = c_int(), []
        for part in (MAJOR_VERSION, MINOR_VERSION, PATCH_LEVEL):
            self.nvjpegGetProperty(part, number)
            parts.append(str(number.value))
        return ".".join(parts)


def declare(function: Any, name: str, types: tuple[Any, ...]) -> Callable[..., int]:
    """Give a function of the library its types, and let it raise NvJpegError."""

    def check(status: int, *_: object) -> int:
        if status != Status.SUCCESS:
            raise NvJpegError(name, status)
        return status

    function.restype, function.argtypes, function.errcheck = c_int, types, check
    declared: Callable[..., int] = function
    return declared


def open_library() -> Library:
    """Load nvJPEG: the package of the CUDA that torch was built for, another one, or the system's.

    Raises ConfigError where there is none, or none that can be loaded.
    """
    reason: OSError | AttributeError | None = None
    for candidate in _candidates():
        try:
            return Library(candidate)
        except (OSError, AttributeError) as error:
            reason = reason or error
    raise ConfigError(
        f"--loader nvjpeg needs the package nvidia-nvjpeg, and no nvJPEG can be loaded ({reason}); "
        "pip install 'fastbyol[nvjpeg]', or choose another --loader"
    ) from ImportError(str(reason))


def _candidates() -> Iterator[str | Path]:
    """Yield the files of installed packages that exist, then the names by which the system may know the library."""
    own = (torch.version.cuda or "").partition(".")[0]
    majors = sorted(MAJORS, key=lambda major: str(major) != own)
    for major in majors:
        yield from _in_packages(f"lib/libnvjpeg.so.{major}", major)
    yield from (f"libnvjpeg.so.{major}" for major in majors)


def _in_packages(file: str, major: int) -> Iterator[Path]:
    """Yield the paths of a file of NVIDIA's packages; CUDA 13's share a folder, before that each had its own."""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for folder in (f"cu{major}", "nvjpeg"):
            path = Path(root, folder, file)
            if path.exists():
                yield path


def find_header() -> Path | None:
    """Return the nvjpeg.h of an installed package; None without one."""
    return next((path for major in MAJORS for path in _in_packages("include/nvjpeg.h", major)), None)
