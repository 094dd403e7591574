"""Laws of nvJPEG as it is installed: its header has what is declared here, and without a GPU its errors arrive."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastbyol.loaders import libnvjpeg
from fastbyol.loaders.libnvjpeg import Library, NvJpegError, Status

pytestmark = pytest.mark.peers

# How a type of the header is declared for ctypes; other pointers are void pointers.
NUMBERS = {
    "int": ctypes.c_int,
    "unsigned int": ctypes.c_uint,
    "size_t": ctypes.c_size_t,
    "libraryPropertyType": ctypes.c_int,  # enums of C are int on Linux
    "nvjpegBackend_t": ctypes.c_int,
    "nvjpegOutputFormat_t": ctypes.c_int,
}
HANDLES = {"nvjpegHandle_t", "nvjpegJpegState_t", "nvjpegJpegStream_t", "cudaStream_t"}


@pytest.fixture(scope="module")
def header() -> str:
    """Read nvjpeg.h without its comments."""
    path = libnvjpeg.find_header()
    if path is None:
        pytest.skip("nvidia-nvjpeg is not installed; make test-peers installs it")
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module")
def library(header: str) -> Library:  # noqa: ARG001
    """Load the library."""
    return libnvjpeg.open_library()


def enum(header: str, type_name: str) -> dict[str, int]:
    """Read the names and numbers of an enum."""
    (body,) = re.findall(r"typedef\s+enum\s*\w*\s*\{([^}]*)\}\s*" + type_name + r"\s*;", header)
    return {name: int(value, 0) for name, value in re.findall(r"(\w+)\s*=\s*(-?\w+)", body)}


def parameters(header: str, function: str) -> Iterator[str]:
    """Read the types of a function's parameters, without their names."""
    (listed,) = re.findall(r"nvjpegStatus_t\s+NVJPEGAPI\s+" + function + r"\s*\(([^)]*)\)", header)
    for each in listed.split(","):
        words = " ".join(each.replace("*", " * ").replace("const ", " ").split())
        yield re.sub(r"\s*\b\w+$", "", words)


def ctype(written: str) -> Any:
    """Choose the declaration of a type of the header."""
    if written in HANDLES:
        return ctypes.c_void_p
    if written.removesuffix(" *") in HANDLES:
        return ctypes.POINTER(ctypes.c_void_p)
    if written.endswith("*"):
        pointed = NUMBERS.get(written.removesuffix(" *"))
        return ctypes.POINTER(pointed) if pointed else ctypes.c_void_p
    return NUMBERS[written]


@pytest.mark.parametrize("name", sorted(libnvjpeg.QUICK | libnvjpeg.SLOW))
def test_a_function_is_declared_as_in_the_header(header: str, name: str) -> None:
    declared = (libnvjpeg.QUICK | libnvjpeg.SLOW)[name]
    wanted = [ctype(written) for written in parameters(header, name)]
    if name == "nvjpegDecodeBatched":  # the lengths are an array of size_t, given by its address
        wanted[3] = ctypes.c_void_p
    assert [*declared] == wanted


def test_enums_and_constants_are_those_of_the_header(header: str) -> None:
    statuses = enum(header, "nvjpegStatus_t")
    assert {f"NVJPEG_STATUS_{status.name}": status.value for status in Status} == statuses
    assert enum(header, "nvjpegBackend_t")["NVJPEG_BACKEND_HARDWARE"] == libnvjpeg.BACKEND_HARDWARE
    assert enum(header, "nvjpegOutputFormat_t")["NVJPEG_OUTPUT_RGBI"] == libnvjpeg.OUTPUT_RGBI
    defined = dict(re.findall(r"#define\s+(NVJPEG_\w+)\s+(\d+(?:\s*<<\s*\d+)?)", header))
    assert int(defined["NVJPEG_MAX_COMPONENT"]) == libnvjpeg.MAX_COMPONENT
    one, shift = defined["NVJPEG_FLAGS_UPSAMPLING_WITH_INTERPOLATION"].split("<<")
    assert int(one) << int(shift) == libnvjpeg.UPSAMPLING_WITH_INTERPOLATION


def test_the_structure_of_an_image_is_that_of_the_header(header: str) -> None:
    (body,) = re.findall(r"typedef\s+struct\s*\{([^}]*)\}\s*nvjpegImage_t\s*;", header)
    found = re.findall(r"([\w ]+?\s*\*?)\s*(\w+)\[NVJPEG_MAX_COMPONENT\];", body)
    written = [("".join(kind.split()), name) for kind, name in found]
    assert written == [("unsignedchar*", "channel"), ("size_t", "pitch")]
    assert [(name, kind._type_, kind._length_) for name, kind in libnvjpeg.Image._fields_] == [
        ("channel", ctypes.c_void_p, 4),
        ("pitch", ctypes.c_size_t, 4),
    ]


def test_the_library_says_the_version_of_its_header(header: str, library: Library) -> None:
    version = [re.findall(rf"NVJPEG_VER_{part}\s+(\d+)", header)[0] for part in ("MAJOR", "MINOR", "PATCH")]
    assert library.version() == ".".join(version)


def test_a_call_that_fails_raises_with_its_name_and_status(library: Library) -> None:
    handle, number = ctypes.c_void_p(), ctypes.c_uint()
    absent = (
        ("nvjpegDestroy", None),
        ("nvjpegJpegStateDestroy", None),
        ("nvjpegJpegStateCreate", None, handle),
        ("nvjpegJpegStreamCreate", None, handle),
        ("nvjpegJpegStreamParseHeader", None, None, 0, None),
        ("nvjpegJpegStreamGetFrameDimensions", None, number, number),
        ("nvjpegDecodeBatchedInitialize", None, None, 1, 1, libnvjpeg.OUTPUT_RGBI),
        ("nvjpegDecodeBatched", None, None, None, None, None, None),
        ("nvjpegGetHardwareDecoderInfo", None, number, number),
    )
    for name, *arguments in absent:
        with pytest.raises(NvJpegError, match=rf"^{name} returned 2 \(INVALID_PARAMETER\)$"):
            getattr(library, name)(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_decoder_is_refused_and_its_flags_are_known(library: Library) -> None:
    handle, known = ctypes.c_void_p(), libnvjpeg.UPSAMPLING_WITH_INTERPOLATION
    for flags, status in ((known, Status.EXECUTION_FAILED), (1 << 30, Status.INVALID_PARAMETER)):
        with pytest.raises(NvJpegError, match="nvjpegCreateEx") as raised:
            library.nvjpegCreateEx(libnvjpeg.BACKEND_HARDWARE, None, None, flags, handle)
        assert raised.value.status == status
    assert handle.value is None
