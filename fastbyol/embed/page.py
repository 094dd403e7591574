"""The map of images as one HTML page: map.html with its style, its scripts and its data, all in one file."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbyol.beton import UNLABELLED, Reader
from fastbyol.embed import thumbnails
from fastbyol.embed.formats import Embedding
from fastbyol.embed.neighbours import Nearest
from fastbyol.evaluate.features import evenly_spaced
from fastbyol.storage import files
from fastbyol.storage.pages import render

POINTS_MAX = 250_000  # images on a page
PAGE_BYTES = 48_000_000
LAYOUT = "pca"  # unless another is asked for
NEAREST = 10  # neighbours of each image
OVERVIEW = 2048  # thumbnails that come first, spread over the map
POINT_BYTES = 82  # of an image without its name and thumbnail, as base64, before it is compressed
CLASS_MAX = 65_000  # classes that are told apart


class Shown(NamedTuple):
    """What a page shows: images, how many of them as thumbnails, and its size."""

    points: int
    thumbnails: int
    bytes: int


def write(
    path: Path,
    reader: Reader,
    embedding: Embedding,
    nearest: Nearest,
    places: NDArray[np.float32],
    *,
    title: str,
    facts: Sequence[str],
    workers: int,
) -> Shown:
    """Write the page of an embedding, its neighbours and places [N, 2]; return what it shows.

    facts: what its head says beside the number of images. Raises OSError.
    """
    samples, count = embedding.vectors.samples, len(embedding)
    packed = {"names": pack(json.dumps(list(embedding.names)).encode())}  # about what they take in another order
    budget = 0.74 * (PAGE_BYTES - len(packed["names"]) - count * POINT_BYTES)  # base64 takes 4 bytes for 3
    px = thumbnails.choose_px(reader, samples, budget=budget)
    first = order_points(places)[: thumbnails.SAMPLE]
    order = order_points(places, limit=int(budget / thumbnails.bytes_each(reader, samples[first], px)))
    classes, class_names = _number_classes(embedding)
    packed = {name: pack(array) for name, array in _arrays(embedding, nearest, places, classes, order).items()}
    sheets = thumbnails.draw(reader, samples[order], px, budget=budget, workers=workers)
    map_facts = {
        "count": count,
        "thumbnails": sheets.thumbnails,
        "px": sheets.px,
        "perRow": sheets.per_row,
        "nearest": nearest.rows.shape[1],
        "classes": class_names,
        "clusters": 0 if embedding.clusters is None else int(embedding.clusters.max()) + 1,
    }
    values = {
        "title": title,
        "facts": [f"{count:,} images", *facts, *_shortage(count, sheets.thumbnails)],
        "map_facts": map_facts,
        "packed": packed,
        "sheets": [base64.b64encode(sheet).decode() for sheet in sheets.jpegs],
    }
    files.write(path, render(Path(__file__).with_name("map.html"), values))
    return Shown(count, sheets.thumbnails, path.stat().st_size)


def _shortage(count: int, shown: int) -> list[str]:
    return [] if shown == count else [f"thumbnails of {shown:,}, spread over the map; the others are dots"]


def _arrays(
    embedding: Embedding,
    nearest: Nearest,
    places: NDArray[np.float32],
    classes: NDArray[np.int64],
    order: NDArray[np.int64],
) -> dict[str, bytes]:
    """Return the bytes of the page's arrays, little-endian, in the order of its points."""
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    found = {
        "places": places[order].astype("<f4").tobytes(),
        "classes": classes[order].astype("<u2").tobytes(),
        "neighbours": rank[nearest.rows[order]].astype("<u4").tobytes(),
        "cosines": np.round(nearest.cosines[order] * 10_000).astype("<i2").tobytes(),
        "names": json.dumps([embedding.names[row] for row in order.tolist()]).encode(),
    }
    if embedding.clusters is not None:
        found["clusters"] = embedding.clusters[order].astype("<u2").tobytes()
    return found


def _number_classes(embedding: Embedding) -> tuple[NDArray[np.int64], list[str]]:
    """Number the classes that occur, the most frequent first, from 1; 0 is none, and what is beyond CLASS_MAX."""
    labels, inverse, counts = np.unique(embedding.labels, return_inverse=True, return_counts=True)
    counts = np.where(labels == UNLABELLED, 0, counts)
    order = np.argsort(-counts, kind="stable")[: min(int((labels != UNLABELLED).sum()), CLASS_MAX)]
    numbers = np.zeros(len(labels), np.int64)
    numbers[order] = np.arange(1, len(order) + 1)
    return numbers[inverse], [embedding.class_name(label) or "" for label in labels[order].tolist()]


def order_points(places: NDArray[np.float32], *, limit: int | None = None) -> NDArray[np.int64]:
    """Order points so that thumbnails which are seen together lie together.

    First come up to OVERVIEW that are spread over the map, level by level of a quadtree; then the others along a
    Z-shaped curve. limit: how many can have thumbnails, None for all; the first so many are spread evenly along that
    curve, and the others follow.
    """
    cells = np.minimum((places.astype(np.float64) * 65536).astype(np.int64), 65535)
    curve = _interleave(cells[:, 0]) | _interleave(cells[:, 1]) << 1
    along = np.argsort(curve, kind="stable")
    spread: dict[int, None] = {}
    for level in range(1, 17):
        _, starts = np.unique(curve[along] >> 2 * (16 - level), return_index=True)
        spread |= dict.fromkeys(along[starts].tolist()[: OVERVIEW - len(spread)])
    first = np.array(list(spread), np.int64)
    rest = along[~np.isin(along, first)]
    chosen = np.zeros(len(rest), bool)
    chosen[evenly_spaced(len(rest), None if limit is None else max(limit - len(first), 0))] = True
    return np.concatenate([first, rest[chosen], rest[~chosen]])


def _interleave(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Spread the 16 bits of each number to the even bits of 32."""
    for shift, mask in ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
        numbers = (numbers | numbers << shift) & mask
    return numbers


def pack(data: bytes) -> str:
    """Compress bytes for the page."""
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()
