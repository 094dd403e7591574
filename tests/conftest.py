"""Know the small files that several tests read."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from fastbyol.beton import JPEG, StoredImage

THREADS = os.environ.setdefault("OMP_NUM_THREADS", "2")  # of the processes that tests start, too: bits depend on it
torch.set_num_threads(int(THREADS))
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which who begins the tests may ignore, as nohup does
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell's background does, and processes pass on
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Betons(NamedTuple):
    """Name a labelled training and validation file and an unlabelled one, all of the demo set's classes."""

    train: Path
    val: Path
    unlabelled: Path


def write_beton(path: Path, count: int, *, split: str, labelled: bool = True) -> Path:
    """Write `count` demo images."""
    from fastbyol import jpeg  # noqa: PLC0415  # kernel tests need no images
    from fastbyol.data_prep import demo  # noqa: PLC0415
    from fastbyol.data_prep.writer import Writer  # noqa: PLC0415

    images, labels = demo.draw(count, seed=0, split=split)
    with Writer(path, capacity=count, class_names=demo.CLASS_NAMES if labelled else None) as writer:
        for image, label in zip(images, labels, strict=True):
            stored = StoredImage(JPEG, 32, 32, jpeg.encode(image, quality=90, subsampling="444"))
            writer.append(stored, label=int(label) if labelled else None)
    return path


@pytest.fixture(scope="session")
def betons(tmp_path_factory: pytest.TempPathFactory) -> Betons:
    """Write 160 training, 60 validation and 40 unlabelled images."""
    folder = tmp_path_factory.mktemp("betons")
    return Betons(
        write_beton(folder / "train.beton", 160, split="train"),
        write_beton(folder / "val.beton", 60, split="val"),
        write_beton(folder / "unlabelled.beton", 40, split="train", labelled=False),
    )
