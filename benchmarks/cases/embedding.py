"""The timed embedding: JPEGs to vectors by the path of fastbyol-embed, beside a plain loop of torch.

Both run the same ResNet-18 on as many threads, and read the images again in each round. The rival is what one would
write: a DataLoader whose workers decode, resize and crop with Pillow, then the encoder in inference mode. torchvision's
own decoder is none of it: its compiled operations do not load beside a CPU build of torch that they were not made for.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.cases.compare import WrongResult
from benchmarks.cases.photographs import draw
from benchmarks.harness import Case, Ready
from fastbyol.beton import JPEG, Reader, StoredImage
from fastbyol.config import EncoderConfig
from fastbyol.data_prep.writer import Writer
from fastbyol.embed import vectors
from fastbyol.embed.vectors import Partial
from fastbyol.evaluate.features import represent_unlabelled
from fastbyol.evaluate.images import BATCH_GPU, InputSettings
from fastbyol.export.network import ordinary
from fastbyol.kernels.reference import IMAGENET_MEAN, IMAGENET_STD
from fastbyol.model.parts import Encoder, build_encoder

DRAWN = 50  # images, which come again and again
STORED_PX, PX = (320, 240), 96
ENCODER = EncoderConfig("resnet18")
CHECKED, COSINE = 8, 0.98  # images, and the least cosine of the vectors of one image, whose two ways of resizing differ


def cases(device: str, *, workers: int, images: int) -> Iterator[Case]:
    """Time both on `device`, with this many decoding threads or processes and images in a round."""
    shape = f"{images} drawn JPEGs of {STORED_PX[0]} x {STORED_PX[1]}, ResNet-18 at {PX} px, {workers} workers"
    folder = tempfile.TemporaryDirectory()
    for name, prepare in (("fastbyol", _ours), ("torch DataLoader, Pillow", _plain)):
        yield Case("embed", shape, name, partial(prepare, folder, device, workers, images), images=images)


def _jpegs() -> list[bytes]:
    return [draw(seed, *STORED_PX) for seed in range(DRAWN)]


def _ours(folder: tempfile.TemporaryDirectory[str], device: str, workers: int, images: int) -> Ready:
    """Prepare the path of fastbyol-embed from a .beton to the file of vectors."""
    beton, jpegs = Path(folder.name) / "images.beton", _jpegs()
    with Writer(beton, capacity=images, class_names=None) as writer:
        for number in range(images):
            writer.append(StoredImage(JPEG, *STORED_PX, jpegs[number % DRAWN]), label=None)
    reader, encoder = Reader(beton), build_encoder(ENCODER, seed=0).to(device).eval()
    inputs = InputSettings(PX, 1.0, workers, device)

    def run() -> Tensor:
        out = Path(folder.name) / "vectors"
        out.unlink(missing_ok=True)
        with Partial(out, "bench", width=encoder.features, dtype="float32") as partial_file:
            vectors.compute(encoder, reader, inputs, partial_file, has_unit_length=False, stop=lambda: False)
            return torch.from_numpy(partial_file.vectors().block(0, images))

    return Ready(run, partial(_check, encoder, reader, inputs))


class _Files(Dataset[Tensor]):
    """The images as Pillow reads them: the centre square, resized and normalised."""

    def __init__(self, jpegs: list[bytes], images: int) -> None:
        self._jpegs, self._images = jpegs, images
        self._mean, self._std = (torch.tensor(each).view(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))

    def __len__(self) -> int:
        return self._images

    def __getitem__(self, index: int) -> Tensor:
        image = Image.open(io.BytesIO(self._jpegs[index % DRAWN])).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        pixels = np.array(image.resize((PX, PX), Image.Resampling.BICUBIC, box=box))
        return (torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 - self._mean) / self._std


def _plain(folder: tempfile.TemporaryDirectory[str], device: str, workers: int, images: int) -> Ready:
    """Prepare a loop as one writes it."""
    del folder
    encoder = ordinary(build_encoder(ENCODER, seed=0)).to(device).eval()
    files = _Files(_jpegs(), images)
    loader = DataLoader(files, batch_size=BATCH_GPU, num_workers=workers, multiprocessing_context="forkserver")

    @torch.inference_mode()
    def run() -> Tensor:
        return torch.cat([encoder(images.to(device)).cpu() for images in loader])

    return Ready(run)


def _check(encoder: Encoder, reader: Reader, inputs: InputSettings) -> None:
    """Raise WrongResult unless the first images have about the vectors that the plain loop gives them."""
    files = _Files(_jpegs(), CHECKED)
    found = represent_unlabelled(encoder, reader, np.arange(CHECKED), inputs)
    with torch.inference_mode():
        images = torch.stack([files[number] for number in range(CHECKED)])
        wanted = ordinary(build_encoder(ENCODER, seed=0)).eval()(images)
    cosines = torch.nn.functional.cosine_similarity(found, wanted)
    if not bool((cosines > COSINE).all()):
        raise WrongResult(f"vectors have cosines down to {cosines.min():.3f} with the plain loop's")
