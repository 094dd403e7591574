"""A writer of .beton files: deterministic bytes, and a file that appears under its name only when complete."""

from __future__ import annotations

import importlib.metadata
import json
import os
import struct
import zlib
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from fastbyol import beton
from fastbyol.beton import BetonError, StoredImage
from fastbyol.data_prep import journal, partial
from fastbyol.data_prep.journal import Journal, Skipped, Stored
from fastbyol.names import NamesWriter, hash_content

IMAGE_RECORD = struct.Struct("<BHHQ")  # mode, width, height, data_ptr
LABELLED_RECORD = struct.Struct("<BHHQ3xq")  # the same and the label, aligned to 8 bytes
ALLOCATION = struct.Struct("<QQQ")  # sample_id, ptr, size
GROUP = 256  # samples between two writes of the journal
KEEP_FROM = 1000  # samples, less than which an interruption removes


class BlockChecksums:
    """The CRC-32 of each block of `block_bytes` of a stream of bytes; the last block may be shorter."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._full: list[int] = []
        self._crc = 0
        self._filled = 0

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Add the next bytes of the stream."""
        rest = memoryview(data)
        while rest:
            part = rest[: self._block_bytes - self._filled]
            rest = rest[len(part) :]
            self._crc = zlib.crc32(part, self._crc)
            self._filled += len(part)
            if self._filled == self._block_bytes:
                self._full.append(self._crc)
                self._crc = self._filled = 0

    def blocks(self) -> list[int]:
        """Return one CRC-32 per block so far."""
        return [*self._full, self._crc] if self._filled else list(self._full)


class Writer:
    """A writer of a .beton and the files beside it, which appear when the `with` block ends without an exception.

    `capacity` is the largest number of images and fixes where the pages start. `class_names` maps label to name; None
    writes an image-only file. The content of `facts` at the end of the block goes into the sidecar, as JSON. Memory
    grows by 48 B per image. Raises BetonError for what the format cannot hold, and OSError for errors of the disk.

    key: what identifies the samples to come, in their order. After a kill, or an interruption behind KEEP_FROM samples,
    a writer with the same path and key goes on behind the samples that were written: `taken` is their number, of which
    `skipped` were left out, and `repaired` stored after a repair, both as (name, reason).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        capacity: int,
        class_names: Sequence[str] | None,
        page_bytes: int = beton.PAGE_BYTES_DEFAULT,
        overwrite: bool = False,
        key: str | None = None,
    ) -> None:
        self.path = Path(path)
        self.taken = 0
        self.skipped: list[tuple[str, str]] = []
        self.repaired: list[tuple[str, str]] = []
        self._key = key
        self.facts: dict[str, Any] = {}
        self._class_names = None if class_names is None else list(class_names)
        self._capacity = capacity
        self._page_bytes = page_bytes
        self._overwrite = overwrite
        self._record = IMAGE_RECORD if class_names is None else LABELLED_RECORD
        require_output(self.path, overwrite=overwrite)
        self._require(capacity > 0, f"capacity is {capacity}; give the number of images to come, at least 1")
        is_page = beton.PAGE_BYTES_MIN <= page_bytes <= beton.PAGE_BYTES_MAX and page_bytes & (page_bytes - 1) == 0
        self._require(is_page, f"page is {page_bytes} bytes; give a power of two from 2 MiB to 2 GiB")
        self._records_ptr = beton.HEADER.itemsize + beton.DESCRIPTOR.itemsize * (1 if class_names is None else 2)
        self._pages_ptr = beton.round_up(self._records_ptr + capacity * self._record.size, page_bytes)

    def __enter__(self) -> Writer:
        self._files = partial.create(self.path, self._key)
        self._stream = self._files.stream
        self._names: NamesWriter | None = None
        self._end = self._pages_ptr
        self._records, self._table = bytearray(), bytearray()
        self._sums = BlockChecksums(self._page_bytes)
        self._journal: Journal | None = None
        if self._key is not None:
            kept = self._replay() if self._files.is_continued else 0
            self._journal = Journal(self._files.journal, self._key, keep_bytes=kept)
        self._stream.seek(self._end)
        self._stream.truncate()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_kept = False
        try:
            with self._stream, self._journal or nullcontext():  # open, and therefore locked, until it has its name
                try:
                    self._write_group()
                    with self._names or nullcontext():
                        if kind is None:
                            self._finish()
                    if kind is None:
                        self._publish()
                except KeyboardInterrupt:
                    is_kept = self._can_continue()
                    raise
                if kind is not None and issubclass(kind, KeyboardInterrupt):
                    is_kept = self._can_continue()
        finally:
            for path in () if is_kept else self._files[1:5]:
                path.unlink(missing_ok=True)

    def _can_continue(self) -> bool:
        """Return whether it is worth going on from what there is, and possible: it has not got its name yet."""
        return self._journal is not None and self.taken >= KEEP_FROM and self._files.beton.exists()

    def _replay(self) -> int:
        """Take up what a killed write left, up to the first image that is not whole; return the journal's bytes."""
        kept = 0
        for entry, end in journal.read(self._files.journal):
            if isinstance(entry, Skipped):
                self.skipped.append((entry.name, entry.reason))
            else:
                data = os.pread(self._stream.fileno(), entry.size, self._end + self._gap(entry.size))
                if len(data) != entry.size or hash_content(data) != entry.content:
                    break
                image = StoredImage(entry.mode, entry.width, entry.height, data)
                self._add(image, label=entry.label, name=entry.name, notes=entry.notes)
            self.taken += 1
            kept = end
        return kept

    def _write_group(self) -> None:
        if self._journal is not None:
            self._stream.flush()
            self._journal.write_group()

    def __len__(self) -> int:
        return len(self._table) // ALLOCATION.size

    def append(
        self, image: StoredImage, *, label: int | None = None, name: str | None = None, notes: Sequence[str] = ()
    ) -> None:
        """Append an image; in a labelled file a label is 0 to the number of classes - 1, or None where there is none.

        name: its path inside the source, for the names file; all images have one, or none has. notes: what was
        repaired.
        """
        self._check(image, label)
        content = self._add(image, label=label, name=name, notes=notes)
        self._stream.write(image.data)
        if self._journal is not None:
            size = len(image.data)
            self._journal.add(
                Stored(image.mode, image.width, image.height, size, label, name or "", content, list(notes))
            )
        self._count_sample()

    def skip(self, name: str, reason: str) -> None:
        """Take note of a sample that is left out."""
        self.skipped.append((name, reason))
        if self._journal is not None:
            self._journal.add(Skipped(name, reason))
        self._count_sample()

    def _count_sample(self) -> None:
        self.taken += 1
        if self._journal is not None and len(self._journal) >= GROUP:
            self._write_group()

    def _add(self, image: StoredImage, *, label: int | None, name: str | None, notes: Sequence[str]) -> str:
        """Add an image at the end to all but the stream; return the hash of its content."""
        size, content = len(image.data), hash_content(image.data)
        if name is not None:
            self._names = self._names or NamesWriter(self._files.names)
            self._names.add(name, content)
        self.repaired += [(name or "", note) for note in notes]
        self._pad(self._gap(size))
        fields = [image.mode, image.width, image.height, self._end]
        self._table += ALLOCATION.pack(len(self), self._end, size)
        if self._class_names is not None:
            fields.append(beton.UNLABELLED if label is None else label)
        self._records += self._record.pack(*fields)
        self._sums.update(image.data)
        self._end += size
        return content

    def _gap(self, size: int) -> int:
        """Count the bytes to leave free before an image of so many: it lies in one page."""
        room = -self._end % self._page_bytes
        return room if size > room else 0

    def _check(self, image: StoredImage, label: int | None) -> None:
        """Raise BetonError for an image or a label that the file cannot hold."""
        number, size = len(self), len(image.data)
        self._require(number < self._capacity, f"image {number} is one more than the capacity of {self._capacity}")
        sides = 0 < image.width <= beton.SIDE_MAX and 0 < image.height <= beton.SIDE_MAX
        self._require(sides, f"image {number} is {image.width}x{image.height}; sides lie in 1 to {beton.SIDE_MAX}")
        wanted = 3 * image.width * image.height if image.mode == beton.RAW else size
        self._require(0 < size == wanted, f"image {number} has {size} bytes; wanted {wanted or 'at least 1'}")
        self._require(size <= self._page_bytes, f"image {number} has {size} bytes; a page holds {self._page_bytes}")
        if self._class_names is None:
            self._require(label is None, f"image {number} has a label; name the classes when opening the writer")
        else:
            known = label is None or 0 <= label < len(self._class_names)
            self._require(known, f"image {number} has label {label}; give 0 to {len(self._class_names) - 1}")

    def _pad(self, count: int) -> None:
        """Skip the next bytes, which stay zero."""
        self._stream.seek(count, os.SEEK_CUR)
        self._sums.update(bytes(count))
        self._end += count

    def _finish(self) -> None:
        """Write the table, the records, the header, which makes the file valid, and the sidecar."""
        self._require(len(self) > 0, "no image was written; give a source with at least one image that decodes")
        self._pad(-self._end % self._page_bytes)
        self._stream.write(self._table)
        self._sums.update(self._table)
        head_sums = BlockChecksums(self._page_bytes)
        self._stream.seek(0)
        for part in (self._head(), self._records):
            self._stream.write(part)
            head_sums.update(part)
        head_sums.update(bytes(self._pages_ptr - self._stream.tell()))
        self._stream.flush()
        os.fsync(self._stream.fileno())
        sidecar = {
            "fastbyol": version(),
            "samples": len(self),
            "class_names": self._class_names,
            **self.facts,
            "checksum": {"block_bytes": self._page_bytes, "crc32": head_sums.blocks() + self._sums.blocks()},
        }
        self._files.sidecar.write_text(json.dumps(sidecar) + "\n", encoding="ascii")

    def _head(self) -> bytes:
        """Return the header and the descriptors."""
        fields = (
            [("image", beton.IMAGE)] if self._class_names is None else [("image", beton.IMAGE), ("label", beton.INT)]
        )
        header = np.zeros(1, beton.HEADER)
        header[0] = (beton.VERSION, len(fields), self._page_bytes, len(self), self._end)
        descriptors = np.zeros(len(fields), beton.DESCRIPTOR)
        for descriptor, (name, type_id) in zip(descriptors, fields, strict=True):
            descriptor["type_id"] = type_id
            descriptor["name"][: len(name)] = list(name.encode("ascii"))
        return header.tobytes() + descriptors.tobytes()

    def _publish(self) -> None:
        """Rename the files to their final names.

        At every moment the name holds a .beton, the old one or the new one. Between the renames, and for good if the
        process is killed there, it has no sidecar: no class names are better than those of another file.
        """
        require_output(self.path, overwrite=self._overwrite)  # another write may have ended in the meantime
        path, sidecar, names = partial.companions(self.path)
        sidecar.unlink(missing_ok=True)
        names.unlink(missing_ok=True)
        self._files.beton.replace(path)
        if self._names is not None:
            self._files.names.replace(names)
        self._files.sidecar.replace(sidecar)

    def _require(self, claim: bool, fault: str) -> None:
        """Raise BetonError unless the claim is true."""
        _require(self.path, claim, fault)


def require_output(path: Path, *, overwrite: bool) -> None:
    """Raise BetonError if a .beton cannot be written at path; called before any image is read."""
    _require(path, not path.is_dir(), "output is a folder; give the name of a .beton file")
    _require(path, path.parent.is_dir(), f"folder {path.parent} does not exist; create it first")
    _require(path, overwrite or not path.exists(), "output exists; give --overwrite or another name")


def _require(path: Path, claim: bool, fault: str) -> None:
    if not claim:
        raise BetonError(f"{path}: {fault}")


def version() -> str:
    """Return fastbyol's installed version, or "not installed" in a bare checkout."""
    try:
        return importlib.metadata.version("fastbyol")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
