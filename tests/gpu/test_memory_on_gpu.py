"""Laws of loader memory on a GPU: images kept at a chosen side have the pixels that a CPU gets, in either memory."""

from __future__ import annotations

import logging
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbyol import loaders
from fastbyol.beton import RAW, Reader, StoredImage
from fastbyol.data_prep.writer import Writer
from fastbyol.loaders import memory
from fastbyol.loaders.resized import at_side
from fastbyol.order import stream

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

COUNT, BATCH, SIDE = 37, 16, 40


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write noise of many sizes."""
    path, random = tmp_path_factory.mktemp("pictures") / "pictures.beton", np.random.default_rng(0)
    with Writer(path, capacity=COUNT, class_names=None) as writer:
        for height, width in random.integers(20, 200, (COUNT, 2)).tolist():
            writer.append(StoredImage(RAW, width, height, random.bytes(height * width * 3)))
    return path


@pytest.mark.parametrize("side", [None, SIDE])
@pytest.mark.parametrize("fits", [True, False])
def test_images_on_the_gpu_are_those_of_the_cpu(
    pictures: Path, side: int | None, fits: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the first epoch, while they are decoded, and in the second, which decodes none."""
    rows = list(islice(stream(0, batch_size=BATCH, count=COUNT, seed=0), 6))
    if not fits:
        monkeypatch.setattr(memory, "GPU_SHARE", 1e-9)
    with Reader(pictures) as file, caplog.at_level(logging.WARNING):
        reader = at_side(file, side)
        with (
            closing(loaders.load("memory", reader, rows, workers=2, device="cuda")) as on_gpu,
            closing(loaders.load("native", reader, rows, workers=2)) as on_cpu,
        ):
            addresses = set()
            for got, wanted in zip(on_gpu, on_cpu, strict=True):
                assert got.pixels.is_cuda
                addresses.add(got.pixels.data_ptr())
                assert got.sizes.equal(wanted.sizes)
                bytes_each = 3 * wanted.sizes.prod(1)
                for at, begin, length in zip(got.offsets, wanted.offsets, bytes_each, strict=True):
                    assert got.pixels[at : at + length].cpu().equal(wanted.pixels[begin : begin + length])
    assert ("stays in RAM" in caplog.text) is not fits
    assert len(addresses) == 1 or not fits
