"""A stand-in for NVIDIA's library nvJPEG that decodes on the host, by libjpeg, into memory of the host.

Its functions are C function pointers with the declared types, so that every call goes through ctypes as one of the real
library does. It writes rows at the pitch it is given, and a batch with a damaged image fails as a whole.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import simplejpeg
import torch

from fastbyol.loaders import libnvjpeg
from fastbyol.loaders.libnvjpeg import Image, Status


class HostNvJpeg:
    """The stand-in, to be used as a Library.

    refused, skipped: bytes of a JPEG; where a batch has the first it fails as a whole, the second is silently left out.
    create_status, decode_status: what creating it and decoding return. live: the handles that have not been destroyed.
    """

    def __init__(self, *, create_status: Status = Status.SUCCESS) -> None:
        self.create_status, self.decode_status = create_status, Status.SUCCESS
        self.refused, self.skipped = b"", b""
        self.live: set[int] = set()
        self.batches: list[int] = []  # the sizes of all that were decoded
        self.header: tuple[int, int] = (0, 0)
        self.initialized: dict[int, int] = {}
        self.calls: dict[str, Any] = {}
        for name, types in (libnvjpeg.QUICK | libnvjpeg.SLOW).items():
            pointer = ctypes.CFUNCTYPE(ctypes.c_int, *types)(self._implementation(name))
            self.calls[name] = libnvjpeg.declare(pointer, name, types)

    def __getattr__(self, name: str) -> Callable[..., int]:
        if not name.startswith("nvjpeg"):
            raise AttributeError(name)
        function: Callable[..., int] = self.calls[name]
        return function

    def version(self) -> str:
        return "0.0.0"

    def _implementation(self, name: str) -> Callable[..., int]:
        if name.endswith("Destroy"):
            return self._destroy
        return {
            "nvjpegCreateEx": lambda backend, device, pinned, flags, out: self.create_status or self._make(out),
            "nvjpegJpegStateCreate": lambda handle, out: self._make(out),
            "nvjpegJpegStreamCreate": lambda handle, out: self._make(out),
            "nvjpegGetProperty": lambda part, out: 0,
            "nvjpegGetHardwareDecoderInfo": lambda handle, engines, cores: self._set((engines, 7), (cores, 1)),
            "nvjpegJpegStreamParseHeader": self._parse,
            "nvjpegJpegStreamGetFrameDimensions": lambda stream, width, height: self._set(
                (width, self.header[1]), (height, self.header[0])
            ),
            "nvjpegDecodeBatchedSupported": lambda handle, stream, out: self._set((out, 0)),
            "nvjpegDecodeBatchedInitialize": self._initialize,
            "nvjpegDecodeBatched": self._decode,
        }[name]

    def _make(self, out: Any) -> int:
        out[0] = len(self.live) + 1 + max(self.live, default=0)
        self.live.add(out[0])
        return Status.SUCCESS

    def _destroy(self, handle: int) -> int:
        self.live.remove(handle)
        return Status.SUCCESS

    def _set(self, *values: tuple[Any, int]) -> int:
        for out, value in values:
            out[0] = value
        return Status.SUCCESS

    def _parse(self, _handle: int, address: int, length: int, _stream: int) -> int:
        try:
            self.header = simplejpeg.decode_jpeg_header(ctypes.string_at(address, length))[:2]
        except ValueError:
            return Status.BAD_JPEG
        return Status.SUCCESS

    def _initialize(self, handle: int, state: int, count: int, threads: int, output: int) -> int:
        assert {handle, state} <= self.live
        assert (threads, output) == (1, libnvjpeg.OUTPUT_RGBI)
        self.initialized[state] = count
        return Status.SUCCESS

    def _decode(self, _handle: int, state: int, data: int, lengths: int, images: int, _stream: int | None) -> int:
        count = self.initialized[state]
        self.batches.append(count)
        addresses = (ctypes.c_size_t * count).from_address(data)
        sizes = (ctypes.c_size_t * count).from_address(lengths)
        payloads = [ctypes.string_at(*each) for each in zip(addresses, sizes, strict=True)]
        if self.refused in payloads:
            return Status.JPEG_NOT_SUPPORTED
        if self.decode_status:
            return self.decode_status
        for payload, image in zip(payloads, (Image * count).from_address(images), strict=True):
            if payload != self.skipped:
                try:
                    pixels = simplejpeg.decode_jpeg(payload, "RGB")
                except ValueError:
                    return Status.BAD_JPEG
                for row, line in enumerate(pixels):
                    ctypes.memmove(image.channel[0] + row * image.pitch[0], line.ctypes.data, line.nbytes)
        return Status.SUCCESS


class HostStream:
    """A stand-in for torch.cuda.Stream and Event: work of the host is done when it is queued."""

    cuda_stream = 0

    def __init__(self, device: torch.device | None = None, **_: bool) -> None:
        self.device = device

    def record(self) -> None:
        """Do nothing: all is done."""

    def synchronize(self) -> None:
        """Do nothing: all is done."""
