"""Layout of a .beton file (FFCV format 2), and a reader that checks every claim the file makes.

    header 24 B | F descriptors of 1041 B | N records | zeros to a page | pages | allocation table to the end

Everything is little endian. An image's record holds its mode, its height and width and its position; its length in
bytes is only in the allocation table.
"""

from __future__ import annotations

import contextlib
import copy
import json
import mmap
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbyol.names import hash_content, read_names

VERSION = 2
JPEG, RAW = 0, 1  # image modes
UNLABELLED = -1  # the label of a sample that has none, in a file with labels
FLOAT, INT, IMAGE, BYTES, NDARRAY, JSON, TENSOR = range(7)  # field types; 255 is a custom one
PAGE_BYTES_MIN, PAGE_BYTES_DEFAULT, PAGE_BYTES_MAX = 1 << 21, 1 << 23, 1 << 31  # FFCV: powers of two, under 4 GiB
SIDE_MAX = 65535  # width and height are u2

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)
DESCRIPTOR = np.dtype([("type_id", "u1"), ("name", "u1", (16,)), ("args", "u1", (1024,))])
IMAGE_RECORD = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])

_SPAN = np.dtype([("ptr", "<u8"), ("size", "<u8")])
_RECORD_OF_TYPE = {
    FLOAT: np.dtype("<f8"),
    INT: np.dtype("<i8"),
    IMAGE: IMAGE_RECORD,
    BYTES: _SPAN,
    NDARRAY: np.dtype("<u8"),
    JSON: _SPAN,
    TENSOR: np.dtype("<u8"),
}
_SIDECAR_TYPES = {"source": str, "settings": dict, "skipped": list, "checksum": dict}
_REWRITE = "write the file again, or copy it again from an intact copy"


class BetonError(ValueError):
    """A .beton file that cannot be used; the message names file and field, what came, what was wanted, what to do."""


@dataclass(frozen=True)
class StoredImage:
    """An image as stored in the file: JPEG bytes, or height x width x 3 bytes of RGB in mode RAW."""

    mode: int
    width: int
    height: int
    data: bytes


def sidecar_path(path: str | os.PathLike[str]) -> Path:
    """Return the path of a .beton file's sidecar: NAME.beton.json in the same folder."""
    return Path(f"{os.fspath(path)}.json")


def is_beton(path: Path) -> bool:
    """Return whether a file begins as a .beton does, whatever its name; False for what is no file or cannot be read."""
    try:
        with path.open("rb") as stream:
            header = stream.read(HEADER.itemsize)
    except OSError:
        return False
    if len(header) < HEADER.itemsize:
        return False
    version, num_fields, page_size, *_ = map(int, np.frombuffer(header, HEADER)[0].item())
    is_page = PAGE_BYTES_MIN <= page_size <= PAGE_BYTES_MAX and page_size & (page_size - 1) == 0
    return version == VERSION and num_fields > 0 and is_page


def record_dtype(type_ids: list[int]) -> np.dtype[Any]:
    """Build the record dtype of one sample from its field types: members f0, f1, ... aligned as in a C struct."""
    return np.dtype([(f"f{i}", _RECORD_OF_TYPE[type_id]) for i, type_id in enumerate(type_ids)], align=True)


def round_up(count: int, multiple: int) -> int:
    """Round `count` up to a multiple."""
    return -(-count // multiple) * multiple


@dataclass(frozen=True)
class _File:
    """The bytes of a file, and its path for messages."""

    path: Path
    data: mmap.mmap

    def require(self, claim: bool | np.bool_, field: str, came: object, wanted: str, remedy: str = _REWRITE) -> None:
        """Raise BetonError about the field unless the claim holds."""
        if not claim:
            raise BetonError(f"{self.path}: {field} is {came}; wanted {wanted}; {remedy}")

    def require_each(self, good: NDArray[np.bool_], field: str, values: NDArray[Any], wanted: str) -> None:
        """Raise BetonError about the first entry that is not good."""
        if not good.all():
            first = int(np.argmin(good))
            count = int(good.size - np.count_nonzero(good))
            self.require(False, f"{field} of entry {first} ({count} bad of {good.size})", values[first], wanted)

    def array(self, dtype: np.dtype[Any], count: int, offset: int) -> NDArray[Any]:
        """Copy `count` items out of the file; the caller must have checked that they lie inside it."""
        return np.frombuffer(self.data, dtype, count, offset).copy()


def _read_header(file: _File) -> tuple[int, int, int, int]:
    """Return num_fields, page_size, num_samples and alloc_table_ptr, checked against the size of the file."""
    size = len(file.data)
    file.require(size >= HEADER.itemsize, "size", size, f"at least {HEADER.itemsize} bytes", "is it a .beton file?")
    version, num_fields, page_size, num_samples, table_ptr = map(int, file.array(HEADER, 1, 0)[0].item())
    file.require(version == VERSION, "version", version, f"{VERSION}", "is it a .beton file (FFCV format 2)?")
    file.require(
        page_size & (page_size - 1) == 0 and PAGE_BYTES_MIN <= page_size <= PAGE_BYTES_MAX,
        "page_size",
        page_size,
        f"a power of two from {PAGE_BYTES_MIN} to {PAGE_BYTES_MAX}",
        "is it a .beton file?",
    )
    file.require(table_ptr != 0, "alloc_table_ptr", 0, "a position", "the writer was interrupted: write the file again")
    file.require(num_fields > 0, "num_fields", 0, "at least 1")
    descriptors_end = HEADER.itemsize + num_fields * DESCRIPTOR.itemsize
    file.require(descriptors_end <= size, "num_fields", num_fields, f"descriptors inside the file's {size} bytes")
    file.require(num_samples > 0, "num_samples", 0, "at least 1", "write the file from a source with images")
    file.require(
        table_ptr <= size and (size - table_ptr) % ALLOCATION.itemsize == 0,
        "alloc_table_ptr",
        table_ptr,
        f"a whole table of {ALLOCATION.itemsize} B entries that ends at the file's {size} bytes",
        f"the file is cut short or damaged: {_REWRITE}",
    )
    entries = (size - table_ptr) // ALLOCATION.itemsize
    wanted = f"one allocation for each sample, at most {num_fields}; the table holds {entries}"
    file.require(num_samples <= entries <= num_samples * num_fields, "num_samples", num_samples, wanted)
    return num_fields, page_size, num_samples, table_ptr


def _read_fields(file: _File, num_fields: int) -> tuple[list[int], list[str]]:
    """Return the type and name of each field; raise BetonError for a type of unknown record size."""
    descriptors = file.array(DESCRIPTOR, num_fields, HEADER.itemsize)
    names = [bytes(raw).rstrip(b"\0").decode("utf-8", "replace") for raw in descriptors["name"]]
    type_ids = [int(type_id) for type_id in descriptors["type_id"]]
    for name, type_id in zip(names, type_ids, strict=True):
        field, remedy = f"type of field {name!r}", "write the file without custom fields"
        file.require(type_id in _RECORD_OF_TYPE, field, type_id, "0 to 6, FFCV's own", remedy)
    return type_ids, names


def _find_field(file: _File, fields: tuple[list[int], list[str]], type_id: int, name: str) -> int | None:
    """Return the index of the field with this type and name, else of the only one with this type, else None."""
    with_type = [i for i, field_type in enumerate(fields[0]) if field_type == type_id]
    matches = [i for i in with_type if fields[1][i] == name] or with_type
    came = ", ".join(repr(fields[1][i]) for i in matches)  # a damaged name may hold anything
    file.require(len(matches) <= 1, f"set of {name} fields", came, "one", f"name one of them {name!r} when writing")
    return matches[0] if matches else None


def _read_allocations(file: _File, pages_ptr: int, page_size: int, table_ptr: int) -> NDArray[Any]:
    """Return the non-empty allocations by position, after checking that each lies in one page and none overlap."""
    table = file.array(ALLOCATION, (len(file.data) - table_ptr) // ALLOCATION.itemsize, table_ptr)
    table = table[table["size"] > 0]
    ptr, size = table["ptr"], table["size"]
    inside = (ptr >= np.uint64(pages_ptr)) & (ptr <= np.uint64(table_ptr))
    file.require_each(inside, "allocation ptr", ptr, f"{pages_ptr} to {table_ptr} (the pages)")
    in_page = size <= np.uint64(page_size) - ptr % np.uint64(page_size)
    file.require_each(in_page, "allocation size", size, f"bytes that end inside their page of {page_size}")
    in_file = size <= np.uint64(table_ptr) - ptr
    file.require_each(in_file, "allocation size", size, f"bytes that end before the allocation table at {table_ptr}")
    table = table[np.argsort(ptr, kind="stable")]
    disjoint = table["ptr"][:-1] + table["size"][:-1] <= table["ptr"][1:]
    file.require_each(disjoint, "allocation ptr", table["ptr"][:-1], "allocations that do not overlap")
    return table


def _locate(file: _File, records: NDArray[Any], table: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the offset and size in bytes of each image, from its sample's allocation."""
    ptr = records["data_ptr"].astype(np.uint64)
    file.require(len(table) > 0, "allocation table", "empty", "an allocation for each image")
    place = np.minimum(np.searchsorted(table["ptr"], ptr), len(table) - 1)
    file.require_each(table["ptr"][place] == ptr, "image data_ptr", ptr, "a position in the allocation table")
    owner = table["sample_id"][place]
    owned = owner == np.arange(len(ptr), dtype=np.uint64)
    file.require_each(owned, "sample_id of the image's allocation", owner, "the image's own sample")
    size = table["size"][place]
    pixels = records["width"].astype(np.uint64) * records["height"].astype(np.uint64)
    file.require_each((records["mode"] != RAW) | (size == 3 * pixels), "size of raw image", size, "height x width x 3")
    return ptr.astype(np.int64), size.astype(np.int64)


def _read_sidecar(path: Path, num_samples: int) -> dict[str, Any]:
    """Return the parsed sidecar, {} without one; raise BetonError if it is broken or describes another file."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return {}
    remedy = "write the .beton again, or remove the sidecar to read without class names"
    try:
        sidecar = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BetonError(f"{path}: sidecar is not JSON ({error}); wanted an object; {remedy}") from error
    if not isinstance(sidecar, dict):
        raise BetonError(f"{path}: sidecar is a {type(sidecar).__name__}; wanted an object; {remedy}")
    for key, wanted in _SIDECAR_TYPES.items():
        if not isinstance(sidecar.get(key, wanted()), wanted):
            raise BetonError(f"{path}: {key} is {sidecar[key]!r:.60}; wanted {wanted.__name__}; {remedy}")
    samples, names = sidecar.get("samples", num_samples), sidecar.get("class_names")
    if samples != num_samples:
        raise BetonError(f"{path}: samples is {samples!r:.60}; wanted {num_samples}, as in the .beton; {remedy}")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise BetonError(f"{path}: class_names is {names!r:.60}; wanted a list of strings; {remedy}")
    return sidecar


class Reader:
    """A memory-mapped .beton file whose images are read without copying.

    Opening it checks everything the file claims, vectorised over the samples, and raises BetonError at the first claim
    that fails. `labels` [N] int64 is None without an int field, and UNLABELLED where a sample has none; `widths`,
    `heights` (pixels), `offsets` and `sizes` (bytes) are [N] int64; `modes` [N] uint8 is JPEG or RAW. Without a sidecar
    `class_names` is None and `sidecar` {}.
    Any number of threads may read at once.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                if size == 0:
                    raise BetonError(f"{self.path}: size is 0 bytes; wanted a .beton file; {_REWRITE}")
                self._map = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise BetonError(f"{self.path}: cannot be opened: {error.strerror}; check the path") from error
        self._bytes = memoryview(self._map)
        self._whole: tuple[Reader, NDArray[np.int64]] | None = None  # of which this is a part, and its samples there
        self._names: list[str] | None = None
        self._names_lock = threading.Lock()  # held while they are read, once
        self._has_read_names = False
        try:
            self._read_index()
        except BetonError:
            self.close()
            raise

    def _read_index(self) -> None:
        """Fill the public arrays from the header, fields, records and allocation table."""
        file = _File(self.path, self._map)
        num_fields, self.page_bytes, num_samples, table_ptr = _read_header(file)
        fields = _read_fields(file, num_fields)
        self.field_names = fields[1]
        image, label = _find_field(file, fields, IMAGE, "image"), _find_field(file, fields, INT, "label")
        file.require(image is not None, "set of fields", fields[1], "an RGBImage", "write the file with one")
        dtype = record_dtype(fields[0])
        records_ptr = HEADER.itemsize + num_fields * DESCRIPTOR.itemsize
        pages_ptr = round_up(records_ptr + num_samples * dtype.itemsize, self.page_bytes)
        wanted = f"records and pages before the allocation table at {table_ptr}"
        file.require(pages_ptr <= table_ptr, "num_samples", num_samples, wanted)
        records = file.array(dtype, num_samples, records_ptr)
        images = records[f"f{image}"]
        self.modes = images["mode"].astype(np.uint8)
        self.widths, self.heights = images["width"].astype(np.int64), images["height"].astype(np.int64)
        file.require_each(self.modes <= RAW, "image mode", self.modes, f"{JPEG} (JPEG) or {RAW} (raw)")
        file.require_each(self.widths > 0, "image width", self.widths, "at least 1")
        file.require_each(self.heights > 0, "image height", self.heights, "at least 1")
        table = _read_allocations(file, pages_ptr, self.page_bytes, table_ptr)
        self.offsets, self.sizes = _locate(file, images, table)
        self.labels: NDArray[np.int64] | None = None if label is None else records[f"f{label}"].astype(np.int64)
        self.sidecar = _read_sidecar(sidecar_path(self.path), num_samples)
        self.class_names: list[str] | None = self.sidecar.get("class_names")
        if self.labels is not None and self.class_names is not None:
            known = (self.labels >= UNLABELLED) & (self.labels < len(self.class_names))
            wanted = f"0 to {len(self.class_names) - 1}, named in the sidecar, or {UNLABELLED}: none"
            file.require_each(known, "label", self.labels, wanted)

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def is_part(self) -> bool:
        """Whether this reads some of its file's samples, as labelled() does."""
        return self._whole is not None

    def labelled(self) -> Reader:
        """Return the samples that have a label as a reader of their own; this one where all have one, or none has."""
        has_label = np.zeros(len(self), bool) if self.labels is None else self.labels != UNLABELLED
        return self if has_label.all() or not has_label.any() else self._part(np.flatnonzero(has_label))

    def _part(self, indices: NDArray[np.int64]) -> Reader:
        """Return a reader of these samples, numbered anew; it reads as long as this one is open, and closes nothing."""
        part = copy.copy(self)
        part._whole, part._names_lock, part._has_read_names = (self, indices), threading.Lock(), False
        for name in ("modes", "widths", "heights", "offsets", "sizes", "labels"):
            of_all = getattr(self, name)
            setattr(part, name, None if of_all is None else of_all[indices])
        return part

    def names(self) -> list[str] | None:
        """Return the names of the samples, their paths inside the source; None without a names file of these images."""
        with self._names_lock:
            if not self._has_read_names:
                self._names, self._has_read_names = self._read_names(), True
        return self._names

    def _read_names(self) -> list[str] | None:
        if self._whole is not None:
            whole, indices = self._whole
            of_all = whole.names()
            return None if of_all is None else [of_all[index] for index in indices.tolist()]
        named = read_names(self.path)
        if named is None or len(named) != len(self):
            return None
        known = {0, len(self) // 2, len(self) - 1}
        is_ours = any(named[index].content == hash_content(self.payload(index)) for index in known)
        return [name for name, _ in named] if is_ours else None

    def describe(self, index: int) -> str:
        """Describe a sample by its number in the file, its name and its class, as far as they are known."""
        names = self.names()
        parts = [] if names is None else [names[index]]
        label = UNLABELLED if self.labels is None else int(self.labels[index])
        if label != UNLABELLED:
            name = str(label) if self.class_names is None else self.class_names[label]
            parts.append(f"class {name if name.isprintable() else ascii(name)}")
        number = index if self._whole is None else int(self._whole[1][index])
        return f"sample {number}" + (f" ({', '.join(parts)})" if parts else "")

    def payload(self, index: int) -> memoryview:
        """Return the bytes of one image without copying: JPEG bytes, or height x width x 3 of raw RGB."""
        offset = int(self.offsets[index])
        return self._bytes[offset : offset + int(self.sizes[index])]

    def close(self) -> None:
        """Release the memory map; it stays alive until the last payload still in use is gone."""
        if self.is_part:
            return
        self._bytes.release()
        with contextlib.suppress(BufferError):
            self._map.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
