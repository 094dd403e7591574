"""Settings of how images are stored: as JPEG, as raw pixels, as a mix of both, or unchanged."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fastbyol import beton

Mode = Literal["auto", "jpeg", "raw", "passthrough", "proportion"]
MODES: tuple[Mode, ...] = ("auto", "jpeg", "raw", "passthrough", "proportion")
SMALL_SIDE = 64  # pixels; mode auto keeps images up to it as they are
PIXELS_LIMIT = 1 << 30  # 3 GiB of RGB
PIXELS_MAX = (1 << 30) // 12  # Pillow's own limit against decompression bombs: 89 Mpx, 256 MiB of RGB
JPEG_SHARE = 0.5  # FFCV's compress_probability


class SettingsError(ValueError):
    """A setting out of its range."""


@dataclass(frozen=True)
class Settings:
    """How images are stored: `max_side` limits the longest side, in pixels; `quality` is libjpeg's 1 to 100.

    `mode`: "auto" keeps images of at most SMALL_SIDE pixels a side as they are, JPEGs byte for byte and lossless ones
    raw, and encodes larger ones as JPEG; see MODES for the others. `jpeg_share` is for mode "proportion": the share of
    images, 0 to 1, stored as JPEG; the others are stored raw. `max_pixels` is the most that is decoded. `stretch`:
    percentiles that become black and white in gray images of more than 8 bits; None maps them linearly. With
    `keeps_damaged` the part of a damaged file that decodes is kept.
    """

    mode: Mode = "auto"
    max_side: int = 500
    quality: int = 90
    jpeg_share: float | None = None
    max_pixels: int = PIXELS_MAX
    stretch: tuple[float, float] | None = None
    keeps_damaged: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise SettingsError(f"mode is {self.mode!r}; give one of {', '.join(MODES)}")
        if not 1 <= self.max_side <= beton.SIDE_MAX:
            raise SettingsError(f"max side is {self.max_side} px; give 1 to {beton.SIDE_MAX}")
        if not 1 <= self.quality <= 100:
            raise SettingsError(f"JPEG quality is {self.quality}; give 1 to 100")
        if self.jpeg_share is not None and self.mode != "proportion":
            raise SettingsError(f"JPEG share is given with mode {self.mode}; give it with mode proportion only")
        if not 1 <= self.max_pixels <= PIXELS_LIMIT:
            raise SettingsError(f"max pixels is {self.max_pixels}; give 1 to {PIXELS_LIMIT}")
        if self.stretch is not None and not 0 <= self.stretch[0] < self.stretch[1] <= 100:
            low, high = self.stretch
            raise SettingsError(f"stretch is {low:g},{high:g}; give two percentiles from 0 to 100, the lower first")
        if not 0 <= self.effective_jpeg_share <= 1:
            raise SettingsError(f"JPEG share is {self.jpeg_share}; give 0 to 1")

    @property
    def effective_jpeg_share(self) -> float:
        """The share of images stored as JPEG in mode "proportion"."""
        return JPEG_SHARE if self.jpeg_share is None else self.jpeg_share

    @property
    def page_bytes(self) -> int:
        """The page size that fits the largest raw image these settings allow."""
        largest = 3 * min(self.max_side**2, self.max_pixels)
        return min(max(beton.PAGE_BYTES_DEFAULT, 1 << (largest - 1).bit_length()), beton.PAGE_BYTES_MAX)

    def is_small(self, side: int) -> bool:
        """Return whether an image of that longest side is kept as it is: any in mode "passthrough"."""
        return self.mode == "passthrough" or side <= SMALL_SIDE

    def wants_raw(self, data: bytes, *, side: int, is_lossless: bool) -> bool:
        """Return whether an image is to be stored as raw pixels: by its longest side, and whether its file is lossless.

        In mode "proportion" a hash of the file decides, so that order, number of workers and --limit do not matter;
        FFCV draws a random number instead.
        """
        if self.mode == "auto":
            return is_lossless and side <= SMALL_SIDE
        if self.mode != "proportion":
            return self.mode == "raw"
        word = hashlib.blake2b(data, digest_size=8).digest()
        return int.from_bytes(word, "little") >= self.effective_jpeg_share * 2**64

    def facts(self) -> dict[str, Any]:
        """Return the settings that apply, for the sidecar."""
        chosen = asdict(self) | {"jpeg_share": self.effective_jpeg_share if self.mode == "proportion" else None}
        optional = ("jpeg_share", "max_pixels", "stretch", "keeps_damaged")
        usual = asdict(Settings()) | {"jpeg_share": None}
        return {key: value for key, value in chosen.items() if key not in optional or value != usual[key]}
