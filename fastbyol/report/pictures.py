"""The pictures of a report: images with their views, and query images with their nearest neighbours."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbyol import views
from fastbyol.beton import Reader
from fastbyol.config import Config
from fastbyol.evaluate.neighbours import Neighbours
from fastbyol.kernels.reference import IMAGENET_MEAN, IMAGENET_STD
from fastbyol.kernels.view_params import ViewParams
from fastbyol.loaders.batch import Batch
from fastbyol.loaders.native import load
from fastbyol.loaders.resized import at_side
from fastbyol.order import Rows, global_batch

SHOWN_IMAGES = 10
THUMBNAIL_PX = 96  # of a neighbour: its size on the page, on a high-resolution screen
LOSSLESS_PX = 64  # smaller pictures are PNG; larger ones JPEG, at a tenth of the bytes


@dataclass(frozen=True)
class Picture:
    """A square picture as an HTML image: its data URL, its side in pixels and its text alternative."""

    src: str
    px: int
    alt: str

    @property
    def is_small(self) -> bool:
        """Whether the picture is shown pixel by pixel, without smoothing."""
        return self.px <= LOSSLESS_PX


@dataclass(frozen=True)
class Cell:
    """A query image (kind "query") or a neighbour of the "same" or of an "other" class, with the name of its class.

    Where classes are not known, a neighbour is "plain" and has its cosine instead of a name.
    """

    picture: Picture
    label: str
    kind: str


def strip_names(config: Config) -> list[str]:
    """Return the names of the pictures of a shown image, from above: the image and its views."""
    later = [
        f"view {number}" if view.local_px is None else f"local view {number}"
        for number, view in enumerate(config.recipe.views[2:], start=3)
    ]
    return ["image", "first view", "second view", *later]


def sample_views(config: Config, train: Reader) -> list[list[Picture]]:
    """Return images of the first batch, each with its views, in the order of strip_names."""
    rows = global_batch(0, batch_size=min(SHOWN_IMAGES, len(train)), count=len(train), seed=config.seed)
    batch = _decode(at_side(train, config.memory_side), rows)
    place = (batch.pixels, batch.offsets, batch.sizes)
    kinds, sizes = config.recipe.drawn_views, batch.sizes.numpy()
    drawn = views.draw(kinds, seed=config.seed, epochs=batch.epochs, indices=batch.indices, sizes=sizes)
    px = config.recipe.crop_px
    whole = views.center_view(*place, crop_px=px, margin=1.0)
    groups = config.recipe.sizes_of_views(px)
    shown = list(_to_pixels(whole)[None])  # of each of strip_names, [images, px, px, 3]
    parts = torch.split(drawn.packed, [count for count, _ in groups])
    for part, (count, side) in zip(parts, groups, strict=True):
        images = _to_pixels(views.apply(*place, ViewParams(part), crop_px=side))
        shown += list(images.reshape(count, -1, side, side, 3))
    names = strip_names(config)
    return [
        [_picture(pixels, f"{name} {number}") for pixels, name in zip(column, names, strict=True)]
        for number, column in enumerate(zip(*shown, strict=True), start=1)
    ]


def neighbour_rows(found: Sequence[Neighbours], bank: Reader, val: Reader) -> list[list[Cell]]:
    """Return a row for each query image: the image, then its nearest neighbours; in one file no classes are known."""
    queries = _thumbnails(val, [row.query for row in found])
    nearest = iter(_thumbnails(bank, [place for row in found for place in row.bank]))
    rows = []
    for row, pixels in zip(found, queries, strict=True):
        wanted = "" if bank is val else _label(val, row.query)
        cells = [Cell(_picture(pixels, f"{wanted or 'an image'}: query{_name(val, row.query)}"), wanted, "query")]
        for place, similarity in zip(row.bank, row.similarities, strict=True):
            label, kind = f"{similarity:.2f}", "plain"
            alt = f"cosine {label}{_name(bank, place)}"
            if bank is not val:
                label = _label(bank, place)
                kind = "same" if label == wanted else "other"
                alt = f"{label}: {kind} class, {alt}"
            cells.append(Cell(_picture(next(nearest), alt), label, kind))
        rows.append(cells)
    return rows


def _label(reader: Reader, index: int) -> str:
    if reader.labels is None:
        return "no class"
    label = int(reader.labels[index])
    names = reader.class_names
    return names[label] if names is not None and label < len(names) else f"class {label}"


def _name(reader: Reader, index: int) -> str:
    """Return a comma and the path of a sample inside its source, if it is known."""
    names = reader.names()
    return "" if names is None else f", {names[index]}"


def _decode(reader: Reader, rows: Rows) -> Batch:
    """Decode one batch; a sample that does not decode gets a stand-in, so that the report is written anyway."""
    with closing(load(reader, [rows], workers=1, on_error="skip")) as batches:
        return next(batches)


def _thumbnails(reader: Reader, indices: Sequence[int]) -> NDArray[np.uint8]:
    """Make thumbnails uint8 [N, px, px, 3] of the centre squares, px at most the side of the smallest image."""
    chosen = np.array(indices, dtype=np.int64)
    batch = _decode(reader, Rows(chosen, np.zeros_like(chosen)))
    px = min(THUMBNAIL_PX, max(int(batch.sizes.min()), 8))
    return _to_pixels(views.center_view(batch.pixels, batch.offsets, batch.sizes, crop_px=px, margin=1.0))


def _to_pixels(images: Tensor) -> NDArray[np.uint8]:
    mean, std = (torch.tensor(c).view(1, 3, 1, 1) for c in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def _picture(pixels: NDArray[np.uint8], alt: str) -> Picture:
    """Encode pixels uint8 [px, px, 3]; `alt` is the text alternative."""
    from PIL import Image  # noqa: PLC0415 - so that fastbyol-train can report in one line that Pillow is missing

    buffer = io.BytesIO()
    px = len(pixels)
    kind = "png" if px <= LOSSLESS_PX else "jpeg"
    Image.fromarray(pixels).save(buffer, kind, **({"quality": 88} if kind == "jpeg" else {}))
    data = base64.b64encode(buffer.getvalue()).decode()
    return Picture(f"data:image/{kind};base64,{data}", px, alt)
