"""Settings of how images are stored: as JPEG, as raw pixels, as a mix of both, or unchanged."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fastbyol import beton

Mode = Literal["jpeg", "raw", "passthrough", "proportion"]
MODES: tuple[Mode, ...] = ("jpeg", "raw", "passthrough", "proportion")
PIXELS_MAX = (1 << 30) // 12  # Pillow's own limit against decompression bombs: 89 Mpx, 256 MiB of RGB
JPEG_SHARE = 0.5  # FFCV's compress_probability


class SettingsError(ValueError):
    """A setting out of its range."""


@dataclass(frozen=True)
class Settings:
    """How images are stored: `max_side` limits the longest side, in pixels; `quality` is libjpeg's 1 to 100.

    `jpeg_share` is for mode "proportion": the share of images, 0 to 1, stored as JPEG; the others are stored raw.
    """

    mode: Mode = "jpeg"
    max_side: int = 500
    quality: int = 90
    jpeg_share: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise SettingsError(f"mode is {self.mode!r}; give one of {', '.join(MODES)}")
        if not 1 <= self.max_side <= beton.SIDE_MAX:
            raise SettingsError(f"max side is {self.max_side} px; give 1 to {beton.SIDE_MAX}")
        if not 1 <= self.quality <= 100:
            raise SettingsError(f"JPEG quality is {self.quality}; give 1 to 100")
        if self.jpeg_share is not None and self.mode != "proportion":
            raise SettingsError(f"JPEG share is given with mode {self.mode}; give it with mode proportion only")
        if not 0 <= self.effective_jpeg_share <= 1:
            raise SettingsError(f"JPEG share is {self.jpeg_share}; give 0 to 1")

    @property
    def effective_jpeg_share(self) -> float:
        """The share of images stored as JPEG in mode "proportion"."""
        return JPEG_SHARE if self.jpeg_share is None else self.jpeg_share

    @property
    def page_bytes(self) -> int:
        """The page size that fits the largest raw image these settings allow."""
        largest = 3 * min(self.max_side**2, PIXELS_MAX)
        return max(beton.PAGE_BYTES_DEFAULT, 1 << (largest - 1).bit_length())

    def wants_raw(self, data: bytes) -> bool:
        """Return whether an image is to be stored as raw pixels.

        In mode "proportion" a hash of its file decides, so that order, number of workers and --limit do not
        matter; FFCV draws a random number instead.
        """
        if self.mode != "proportion":
            return self.mode == "raw"
        word = hashlib.blake2b(data, digest_size=8).digest()
        return int.from_bytes(word, "little") >= self.effective_jpeg_share * 2**64

    def facts(self) -> dict[str, Any]:
        """Return the settings that apply, for the sidecar."""
        share = {"jpeg_share": self.effective_jpeg_share} if self.mode == "proportion" else {}
        return {key: value for key, value in asdict(self).items() if key != "jpeg_share"} | share
