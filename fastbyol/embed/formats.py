"""The files of vectors: .parquet, .npz, .csv and .npy, each written block by block under a temporary name."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from fastbyol.beton import UNLABELLED
from fastbyol.embed.tables import csv_line, parquet_writer
from fastbyol.embed.vectors import Vectors
from fastbyol.storage import files

ROWS = 4096  # of a block, and of a row group of parquet
DIGITS = {"float32": 9, "float16": 5}  # with which a number comes back as it was


@dataclass(frozen=True)
class Embedding:
    """Vectors [N, F] with what is known of their images.

    names: N names; labels: int64 [N], UNLABELLED where there is none; class_names: those of the labels, if they have
    any; clusters: int64 [N], if they were asked for.
    """

    vectors: Vectors
    names: Sequence[str]
    labels: NDArray[np.int64]
    class_names: Sequence[str] | None = None
    clusters: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.vectors)

    def part(self, rows: NDArray[np.int64]) -> Embedding:
        """Return these rows alone."""
        clusters = None if self.clusters is None else self.clusters[rows]
        names = [self.names[row] for row in rows.tolist()]
        return Embedding(self.vectors.part(rows), names, self.labels[rows], self.class_names, clusters)

    def class_name(self, label: int) -> str | None:
        """Return the name of a class, or its number where it has none; None for UNLABELLED."""
        if label == UNLABELLED:
            return None
        name = str(label) if self.class_names is None else self.class_names[label]
        return name.encode(errors="backslashreplace").decode()


def companions(path: Path, *, has_clusters: bool) -> list[Path]:
    """List the files that are written beside one of vectors: what a .npy has no room for."""
    names, clusters = path.with_suffix(".names.txt"), path.with_suffix(".clusters.npy")
    return [names, *([clusters] if has_clusters else [])] if path.suffix == ".npy" else []


def write(path: Path, embedding: Embedding) -> None:
    """Write vectors in the form that the suffix names, last of its files; raise OSError where the disk refuses."""
    for beside in companions(path, has_clusters=embedding.clusters is not None):
        with files.replacement(beside) as file:
            if embedding.clusters is not None and beside.suffix == ".npy":
                np.save(file, embedding.clusters)
            else:
                file.writelines(f"{name}\n".encode(errors="backslashreplace") for name in embedding.names)
    with files.replacement(path) as file:
        FORMATS[path.suffix](file, embedding)


def _blocks(count: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + ROWS, count)) for first in range(0, count, ROWS))


def _write_parquet(file: IO[bytes], embedding: Embedding) -> None:
    """Write the columns name, label, class, vector and, if there are any, cluster."""
    import pyarrow as pa  # noqa: PLC0415 - of an extra

    width = embedding.vectors.features
    number = pa.float16() if embedding.vectors.dtype == np.float16 else pa.float32()
    columns = {"name": pa.string(), "label": pa.int64(), "class": pa.string(), "vector": pa.list_(number, width)}
    clusters = embedding.clusters
    if clusters is not None:
        columns["cluster"] = pa.int64()
    with parquet_writer(file, columns, repeated=("class",)) as add:
        for first, end in _blocks(len(embedding)):
            labels = embedding.labels[first:end]
            flat = pa.array(embedding.vectors.block(first, end).ravel(), number)
            block = [
                pa.array(embedding.names[first:end], pa.string()),
                pa.array(labels, mask=labels == UNLABELLED),
                pa.array([embedding.class_name(label) for label in labels.tolist()], pa.string()),
                pa.FixedSizeListArray.from_arrays(flat, width),
            ]
            add([*block, *([] if clusters is None else [pa.array(clusters[first:end])])])


def _write_csv(file: IO[bytes], embedding: Embedding) -> None:
    """Write a line of names, then one for each image: name, label, cluster if there are any, and the numbers."""
    width, clusters = embedding.vectors.features, embedding.clusters
    form = ",".join([f"%.{DIGITS[embedding.vectors.dtype.name]}g"] * width)
    facts = ["name", "label", *([] if clusters is None else ["cluster"])]
    file.write(csv_line([*facts, *(f"v{number}" for number in range(width))]))
    for first, end in _blocks(len(embedding)):
        for row, numbers in enumerate(embedding.vectors.block(first, end).tolist(), start=first):
            label = int(embedding.labels[row])
            known = [embedding.names[row], "" if label == UNLABELLED else label]
            line = csv_line([*known, *([] if clusters is None else [int(clusters[row])])]).rstrip(b"\n")
            file.write(line + b"," + (form % tuple(numbers)).encode() + b"\n")


def _write_npy(file: IO[bytes], embedding: Embedding) -> None:
    """Write the vectors alone, [N, F]."""
    vectors = embedding.vectors
    header = {
        "descr": np.lib.format.dtype_to_descr(vectors.dtype),
        "fortran_order": False,
        "shape": (len(vectors), vectors.features),
    }
    np.lib.format.write_array_header_1_0(file, header)
    for first, end in _blocks(len(vectors)):
        file.write(vectors.block(first, end).data)


def _write_npz(file: IO[bytes], embedding: Embedding) -> None:
    """Write the arrays names, labels, vectors and, if there are any, clusters; only the names are compressed."""
    with zipfile.ZipFile(file, "w") as archive:
        with _member(archive, "names", zipfile.ZIP_DEFLATED) as member:
            _write_names(member, embedding.names)
        arrays = {"labels": embedding.labels, "clusters": embedding.clusters}
        for name, array in arrays.items():
            if array is not None:
                with _member(archive, name) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
        with _member(archive, "vectors") as member:
            _write_npy(member, embedding)


def _member(archive: zipfile.ZipFile, name: str, compression: int = zipfile.ZIP_STORED) -> IO[bytes]:
    info = zipfile.ZipInfo(f"{name}.npy")  # dated 1980, so that the same vectors are the same bytes
    info.compress_type = compression
    return archive.open(info, "w", force_zip64=True)


def _write_names(file: IO[bytes], names: Sequence[str]) -> None:
    """Write an array of texts, all as wide as the longest."""
    dtype = np.dtype(f"<U{max(map(len, names), default=1) or 1}")
    header = {"descr": dtype.str, "fortran_order": False, "shape": (len(names),)}
    np.lib.format.write_array_header_1_0(file, header)
    for first, end in _blocks(len(names)):
        file.write(np.array(names[first:end], dtype).tobytes())


FORMATS: dict[str, Callable[[IO[bytes], Embedding], None]] = {
    ".parquet": _write_parquet,
    ".npz": _write_npz,
    ".csv": _write_csv,
    ".npy": _write_npy,
}
