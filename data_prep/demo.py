"""The demo set: ten classes of textured shapes, drawn with arithmetic that rounds the same way on every machine.

A class is one (shape, texture) pair: texture survives BYOL's small crops, shape survives its recolouring. Colour, which
an untrained encoder responds to first, varies as much within an image as between images. A property that is constant
over an image (one hue, one brightness, one contrast) would let BYOL match two crops without using the class: with one
hue per image, trained kNN fell below that of the random-init encoder.

Only + - * / sqrt, floor and comparisons of float64 are used, each correctly rounded by IEEE 754, on raw Philox words,
so that the pixels are the same on every machine and NumPy release.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbyol import beton, jpeg
from fastbyol.data_prep.writer import Writer

Plane = NDArray[np.float64]  # [B, 32, 32], or a shape that broadcasts with it

SIDE_PX = 32
COUNTS = {"train": 5000, "val": 1000}
JPEG_QUALITY = 90
TONE_CONTRAST = 0.35  # distance of the two tones from middle gray
CHROMA = 0.45  # of every pixel; from 0.6 on clipping removes the tones
HUE_TURNS = 1.5  # across the image; with one hue per image, BYOL learns the hue
LUMA = (0.2989, 0.5870, 0.1140)


class _Draws:
    """Uniform float64 draws from stream `number` of Philox with key `seed`."""

    def __init__(self, seed: int, number: int) -> None:
        self._bits = np.random.Philox(key=(number << 64) + seed)

    def __call__(self, low: float, high: float, *shape: int) -> Plane:
        """Return U[low, high) of `shape`, from the top 53 bits of raw words."""
        count = 1
        for length in shape:
            count *= length
        words = self._bits.random_raw(count) >> np.uint64(11)
        unit: Plane = words.reshape(shape).astype(np.float64) * 2.0**-53
        return low + (high - low) * unit


def _noise(draws: _Draws, count: int, cells: int) -> Plane:
    """Return value noise in [-0.5, 0.5], [count, 32, 32]: a bilinear between a random lattice, `cells` per side."""
    lattice = draws(-0.5, 0.5, count, cells + 1, cells + 1)
    at = (np.arange(SIDE_PX) + 0.5) * (cells / SIDE_PX)
    low = np.floor(at).astype(np.int64)
    part = at - low
    rows: Plane = lattice[:, low] * (1.0 - part)[:, None] + lattice[:, low + 1] * part[:, None]
    noise: Plane = rows[:, :, low] * (1.0 - part) + rows[:, :, low + 1] * part
    return noise


def _radius(u: Plane, v: Plane) -> Plane:
    distance: Plane = np.sqrt(u * u + v * v)
    return distance


# Shapes: signed distance to the outline, negative inside, in units of the shape's own radius.


def _disc(u: Plane, v: Plane) -> Plane:
    return _radius(u, v) - 0.88


def _square(u: Plane, v: Plane) -> Plane:
    return np.maximum(np.abs(u), np.abs(v)) - 0.78


def _triangle(u: Plane, v: Plane) -> Plane:
    return np.maximum(-v, 0.8660254 * np.abs(u) + 0.5 * v) - 0.55


def _ring(u: Plane, v: Plane) -> Plane:
    return np.abs(_radius(u, v) - 0.64) - 0.32


def _cross(u: Plane, v: Plane) -> Plane:
    a, b = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(a - 0.34, b - 1.0), np.maximum(a - 1.0, b - 0.34))


def _star(u: Plane, v: Plane) -> Plane:
    """Return the distance to a pentagram: the points inside at least four of its five half planes."""
    near, far = 0.9510565 * np.abs(u), 0.5877853 * np.abs(u)
    sides = [-v, near - 0.3090170 * v, -near - 0.3090170 * v, far + 0.8090170 * v, -far + 0.8090170 * v]
    fourth: Plane = np.sort(np.stack(sides), axis=0)[-2]
    return fourth - 0.42


def _crescent(u: Plane, v: Plane) -> Plane:
    return np.maximum(_radius(u, v) - 1.0, 0.66 - _radius(u - 0.48, v))


def _hexagon(u: Plane, v: Plane) -> Plane:
    return np.maximum(np.abs(v), 0.8660254 * np.abs(u) + 0.5 * np.abs(v)) - 0.82


def _heart(u: Plane, v: Plane) -> Plane:
    lobes = _radius(np.abs(u) - 0.4, v + 0.3) - 0.5
    point = np.maximum(0.7071068 * (np.abs(u) + v) - 0.55, -v - 0.3)
    return np.minimum(lobes, np.maximum(point, np.abs(u) - 0.9))


def _hourglass(u: Plane, v: Plane) -> Plane:
    return np.maximum(np.abs(v) - 0.85, 0.8 * (np.abs(u) - np.abs(v)) - 0.12)


# Textures: a wave of about -1 to 1 over coordinates in periods; its sign chooses one of two tones for a pixel.


def _triangle_wave(x: Plane) -> Plane:
    return 4.0 * np.abs(x - np.floor(x) - 0.5) - 1.0


def _cell(x: Plane) -> Plane:
    return x - np.floor(x) - 0.5


def _stripes(a: Plane, _b: Plane) -> Plane:
    return _triangle_wave(a)


def _checker(a: Plane, b: Plane) -> Plane:
    return 1.5 * _triangle_wave(0.6 * a) * _triangle_wave(0.6 * b)


def _dots(a: Plane, b: Plane) -> Plane:
    return 1.3 - 4.0 * _radius(_cell(a), _cell(b + 0.5 * np.floor(a)))


def _rings(a: Plane, b: Plane) -> Plane:
    return _triangle_wave(_radius(a, b))


def _lattice(a: Plane, b: Plane) -> Plane:
    return np.maximum(_triangle_wave(a), _triangle_wave(b)) - 0.45


def _spokes(a: Plane, b: Plane) -> Plane:
    """Return cos(8 angle), by three squarings of the unit vector as a complex number."""
    r = _radius(a, b) + 1e-9
    x, y = a / r, b / r
    for _ in range(3):
        x, y = x * x - y * y, 2.0 * x * y
    return x


def _plain(a: Plane, _b: Plane) -> Plane:
    return np.full_like(a, -1.0)


class _Kind(NamedTuple):
    name: str
    shape: Callable[[Plane, Plane], Plane]
    texture: Callable[[Plane, Plane], Plane] | int  # int: random blotches, this many cells per side of the image
    is_centred: bool = False  # the texture's origin is the shape's centre


_KINDS = (
    _Kind("striped disc", _disc, _stripes),
    _Kind("checkered square", _square, _checker),
    _Kind("dotted heart", _heart, _dots),
    _Kind("rippled hexagon", _hexagon, _rings, is_centred=True),
    _Kind("latticed triangle", _triangle, _lattice),
    _Kind("speckled cross", _cross, 16),
    _Kind("blotched hourglass", _hourglass, 7),
    _Kind("spoked ring", _ring, _spokes, is_centred=True),
    _Kind("plain star", _star, _plain),
    _Kind("plain crescent", _crescent, _plain),
)
CLASS_NAMES: tuple[str, ...] = tuple(kind.name for kind in _KINDS)


def _turn(x: Plane, y: Plane, sine: Plane) -> tuple[Plane, Plane]:
    cosine = np.sqrt(1.0 - sine * sine)
    return x * cosine + y * sine, y * cosine - x * sine


def _forms(kind: _Kind, draws: _Draws, count: int) -> tuple[Plane, Plane]:
    """Return the coverage by the shape and by the second tone of each pixel, both [count, 32, 32] in [0, 1]."""
    one = (count, 1, 1)
    grid = np.arange(SIDE_PX) + 0.5 - SIDE_PX / 2
    x = grid[None, None, :] - draws(-3.5, 3.5, *one)
    y = grid[None, :, None] - draws(-3.5, 3.5, *one)
    radius_px, period_px, stretch = draws(12.0, 16.0, *one), draws(4.3, 7.5, *one), draws(0.85, 1.0, *one)
    u, v = _turn(x, y, draws(-0.4, 0.4, *one))
    inside = np.clip(0.5 - kind.shape(u / (radius_px * stretch), v / radius_px) * radius_px, 0.0, 1.0)
    if isinstance(kind.texture, int):
        wave = 8.0 * _noise(draws, count, kind.texture)
    else:
        phase = 0.0 if kind.is_centred else 1.0
        a, b = _turn(x, y, draws(-0.4, 0.4, *one))
        wave = kind.texture(a / period_px + draws(0.0, phase, *one), b / period_px + draws(0.0, phase, *one))
    return inside, np.clip(0.5 + 0.25 * period_px * wave, 0.0, 1.0)


def _paint(level: Plane, hue: Plane) -> Plane:
    """Return RGB [B, 32, 32, 3] of luma `level` before clipping, coloured by `hue` in turns (any real)."""
    wheel = np.stack([hue, hue + 2 / 3, hue + 1 / 3], axis=-1)
    pure = np.clip(6.0 * np.abs(wheel - np.floor(wheel) - 0.5) - 1.0, 0.0, 1.0)
    luma = pure[..., 0] * LUMA[0] + pure[..., 1] * LUMA[1] + pure[..., 2] * LUMA[2]
    return (level - CHROMA * luma)[..., None] + CHROMA * pure


def _draw_kind(kind: _Kind, draws: _Draws, count: int) -> NDArray[np.uint8]:
    """Draw `count` images of one class, uint8 [count, 32, 32, 3]."""
    one = (count, 1, 1)
    inside, tone = _forms(kind, draws, count)
    polarity = np.where(draws(0.0, 1.0, *one) < 0.5, TONE_CONTRAST, -TONE_CONTRAST)
    across = np.arange(SIDE_PX) / SIDE_PX
    slope_x, slope_y = draws(-1.0, 1.0, *one), draws(-1.0, 1.0, *one)
    ramp = (slope_x * across + slope_y * across[:, None]) * (HUE_TURNS / (_radius(slope_x, slope_y) + 1e-9))
    hue = draws(0.0, 1.0, *one) + ramp + _noise(draws, count, 3)
    first = _paint(0.5 + polarity, hue + draws(0.0, 1.0, *one))
    second = _paint(0.5 - polarity, hue + draws(0.0, 1.0, *one))
    image = _paint(0.5 + 0.25 * _noise(draws, count, 4), hue)
    image += (first + (second - first) * tone[..., None] - image) * inside[..., None]
    image += draws(-0.03, 0.03, count, SIDE_PX, SIDE_PX, 1)
    return (np.clip(image, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def draw(count: int, *, seed: int, split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw `count` images and labels in random order, spread over the classes as evenly as `count` allows.

    Returns uint8 [count, 32, 32, 3] RGB and int64 [count] indices into CLASS_NAMES, a function of the arguments. `seed`
    lies in [0, 2**64). `split` is "train" or "val"; the two use disjoint random streams.
    """
    if split not in COUNTS:
        raise ValueError(f"split is {split!r}; give one of {', '.join(COUNTS)}")
    draws = _Draws(seed, list(COUNTS).index(split))
    labels = np.argsort(draws(0.0, 1.0, count), kind="stable") % len(_KINDS)
    images = np.empty((count, SIDE_PX, SIDE_PX, 3), np.uint8)
    for label, kind in enumerate(_KINDS):
        where = np.flatnonzero(labels == label)
        images[where] = _draw_kind(kind, draws, len(where))
    return images, labels.astype(np.int64)


def write(directory: Path, *, seed: int = 0, overwrite: bool = False) -> tuple[Path, Path]:
    """Write train.beton (5000 images) and val.beton (1000) of JPEG quality 90 into the directory; return both paths.

    Creates the directory. Raises BetonError, before drawing anything, if a file exists and `overwrite` is false.
    """
    directory.mkdir(parents=True, exist_ok=True)
    train, val = (
        Writer(directory / f"{split}.beton", capacity=count, class_names=CLASS_NAMES, overwrite=overwrite)
        for split, count in COUNTS.items()
    )
    for writer, (split, count) in zip((train, val), COUNTS.items(), strict=True):
        with writer:
            writer.facts["source"] = f"fastbyol-prep demo, {split}, seed {seed}"
            images, labels = draw(count, seed=seed, split=split)
            for image, label in zip(images, labels.tolist(), strict=True):
                data = jpeg.encode(image, quality=JPEG_QUALITY, subsampling="444")
                writer.append(beton.StoredImage(beton.JPEG, SIDE_PX, SIDE_PX, data), label=label)
    return train.path, val.path
