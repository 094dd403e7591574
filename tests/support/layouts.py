"""Sources of images for tests: folders, archives and shards, and a list of what a source yields."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from fastbyol.data_prep.sources.base import Sample

Contents = list[tuple[str, int | None, bytes]]


def draw(seed: int, *, kind: str = "JPEG", side: int = 40) -> bytes:
    """Draw a noisy image file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side + seed % 7, 3)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def lay_out(folder: Path, files: dict[str, bytes]) -> Path:
    """Write files below a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def pack(path: Path, files: dict[str, bytes], extra: Iterable[tarfile.TarInfo] = (), mode: str = "w") -> Path:
    """Write files, then empty members, into an archive, in that order."""
    path.write_bytes(packed(files, extra, mode))
    return path


def packed(files: dict[str, bytes], extra: Iterable[tarfile.TarInfo] = (), mode: str = "w") -> bytes:
    """Return an archive of files, then empty members, in that order."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member in extra:
            archive.addfile(member)
    return stream.getvalue()


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    """Make a member that is a link or a device."""
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def contents(samples: Iterable[Sample]) -> Contents:
    """List name, label and bytes of each sample."""
    return [(sample.name, sample.label, sample.read()) for sample in samples]
