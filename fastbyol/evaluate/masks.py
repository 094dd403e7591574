"""Pairs of images and segmentation masks: finding, reading and augmenting them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastbyol import philox
from fastbyol.errors import ConfigError, require
from fastbyol.jpeg import PILLOW_ERRORS
from fastbyol.kernels.reference import IMAGENET_MEAN, IMAGENET_STD
from fastbyol.order import global_batch
from fastbyol.system.progress import Progress

if TYPE_CHECKING:
    from PIL import Image

IGNORED = 255  # mask value of a pixel that is not scored, as in PASCAL VOC
WORKERS = 2  # threads that read, scale and crop
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
SCALES = (0.5, 2.0)  # range of a training pair's scale; He et al. 2020 (MoCo), appendix


class Pair(NamedTuple):
    """The paths of an image and its mask."""

    image: Path
    mask: Path


def find_pairs(images: Path, masks: Path) -> list[Pair]:
    """List each image of a folder with the mask of the same name (NAME.png), sorted by name.

    A mask is a PNG with one channel, or a palette, whose values are class numbers; 255 is ignored. Raises ConfigError
    if an image or a mask has no partner.
    """
    for folder in (images, masks):
        require(folder.is_dir(), f"{folder} is not a folder; give a folder of files")
    names = {path.stem: path for path in sorted(images.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES}
    found = {path.stem: path for path in sorted(masks.glob("*.png"))}
    require(bool(names), f"{images} holds no image; give a folder with {', '.join(IMAGE_SUFFIXES)} files")
    alone = sorted(set(names) ^ set(found))
    require(
        not alone,
        f"{len(alone)} names occur in only one of {images} ({len(names)} images) and {masks} ({len(found)} masks), "
        f"such as {alone[:1]}; give each image NAME.jpg or NAME.png one mask NAME.png",
    )
    return [Pair(names[stem], found[stem]) for stem in names]


def read_pair(pair: Pair) -> tuple[Tensor, Tensor]:
    """Read a pair: the normalised image, float32 [3, H, W], and the mask, int64 [H, W]."""
    pixels, mask = _decode(pair)
    std, mean = (torch.tensor(c)[:, None, None] for c in (IMAGENET_STD, IMAGENET_MEAN))
    image = torch.from_numpy(pixels).permute(2, 0, 1).float().div_(255).sub_(mean).div_(std)
    return image, torch.from_numpy(mask).long()


def _decode(pair: Pair) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Decode a pair to pixels [H, W, 3] and class numbers [H, W]; raise ConfigError if they do not fit together."""
    with _open(pair.image) as file:
        pixels = np.array(file.convert("RGB"))
    with _open(pair.mask) as file:
        require(file.mode in ("L", "P", "1"), f"{pair.mask} has mode {file.mode}; give one channel or a palette")
        mask = np.array(file, dtype=np.uint8)
    require(
        pixels.shape[:2] == mask.shape,
        f"{pair.mask} is {mask.shape[1]} x {mask.shape[0]} pixels and its image {pixels.shape[1]} x {pixels.shape[0]}; "
        "give masks of their images' sizes",
    )
    return pixels, mask


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    """Open an image; raise ConfigError for any error of Pillow, here or in the with-block."""
    from PIL import Image  # noqa: PLC0415 - so that fastbyol-eval can report in one line that Pillow is missing

    try:
        with Image.open(path) as file:
            yield file
    except ConfigError:
        raise
    except (*PILLOW_ERRORS, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); replace or remove it, and its partner") from error


def find_classes(found: Sequence[Pair]) -> NDArray[np.int64]:
    """Return the class numbers that occur in the masks, ascending; raise ConfigError for none or for an unusable pair.

    Every pair is decoded, so that a bad file is reported before training starts.
    """
    seen = np.zeros(256, dtype=np.bool_)
    for pair in Progress(found, total=len(found), desc="masks", unit="pairs"):
        seen[np.unique(_decode(pair)[1])] = True
    numbers = np.flatnonzero(seen[:IGNORED])
    require(len(numbers) > 0, f"the masks in {found[0].mask.parent} hold only {IGNORED}; give masks with class numbers")
    return numbers


def augment(image: Tensor, mask: Tensor, u: NDArray[np.float32], *, px: int) -> tuple[Tensor, Tensor]:
    """Scale a pair by 0.5 to 2, crop it to px x px and flip it half of the time, from the four uniform draws `u`.

    Where the pair is smaller than the crop, the image is padded with the mean and the mask with IGNORED.
    """
    scale = SCALES[0] * (SCALES[1] / SCALES[0]) ** float(u[0])
    height, width = (max(round(side * scale), 1) for side in mask.shape)
    image = F.interpolate(image[None], (height, width), mode="bilinear", align_corners=False)[0]
    mask = F.interpolate(mask[None, None].float(), (height, width), mode="nearest-exact")[0, 0].long()
    below, right = max(px - height, 0), max(px - width, 0)
    image, mask = F.pad(image, (0, right, 0, below)), F.pad(mask, (0, right, 0, below), value=IGNORED)
    top, left = (int(v * (side - px + 1)) for v, side in zip(u[1:3].tolist(), mask.shape, strict=True))
    image, mask = image[:, top : top + px, left : left + px], mask[top : top + px, left : left + px]
    return (image.flip(2), mask.flip(1)) if u[3] < 0.5 else (image, mask)


def augmented_batches(
    found: Sequence[Pair], *, px: int, batch: int, steps: int, seed: int, device: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `steps` batches of images [n, 3, px, px] and masks [n, px, px]; draws depend on (seed, epoch, pair).

    Two threads prepare the next batch in the meantime.
    """

    def draw_pair(index: int, draws: NDArray[np.float32]) -> tuple[Tensor, Tensor]:
        return augment(*read_pair(found[index]), draws, px=px)

    def submit_batch(k: int) -> list[Future[tuple[Tensor, Tensor]]]:
        rows = global_batch(k, batch_size=batch, count=len(found), seed=seed)
        counter = np.zeros((batch, 4), np.uint32)
        counter[:, 0], counter[:, 2] = rows.indices, rows.epochs
        u = philox.uniform(philox.philox4x32(counter, philox.key_of(seed)))
        return [threads.submit(draw_pair, index, draws) for index, draws in zip(rows.indices.tolist(), u, strict=True)]

    with ThreadPoolExecutor(WORKERS, "segment") as threads:
        pending = submit_batch(0)
        for k in range(1, steps + 1):
            made = [future.result() for future in pending]
            pending = submit_batch(k) if k < steps else []
            images, wanted = (torch.stack(parts).to(device) for parts in zip(*made, strict=True))
            yield images, wanted
