"""Laws of DALI's crop: the boxes are those drawn, the crop is about ours, and all that follows is ours."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbyol import loaders, views
from fastbyol.beton import Reader
from fastbyol.cli.train import main
from fastbyol.config import ViewConfig
from fastbyol.kernels.reference import IMAGENET_STD
from fastbyol.kernels.view_params import ViewParams
from fastbyol.loaders.batch import Batch
from fastbyol.monitor.metrics import read_metrics
from fastbyol.order import stream
from fastbyol.storage.run_folder import RunFolder
from tests.conftest import Betons

pytestmark = pytest.mark.peers
pytest.importorskip("nvidia.dali")
SIDE = 32  # of the images
LEVELS_APART = 0.5  # on average; measured .28, half of it rounding to uint8


def draw(view: ViewConfig, batch: Batch, count: int = 2) -> ViewParams:
    return views.draw((view,) * count, seed=1, epochs=batch.epochs, indices=batch.indices, sizes=batch.sizes.numpy())


def both(betons: Betons, view: ViewConfig, *, crop_px: int, count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the views of a few batches with our crop and with DALI's."""
    from fastbyol.loaders.dali_crop import crop  # noqa: PLC0415

    with Reader(betons.train) as reader:
        rows = [*islice(stream(2, batch_size=7, count=len(reader), seed=0), 3)]
        whole = list(loaders.load("native", reader, rows, workers=1))
        settings = {"crop_px": crop_px, "workers": 1, "device": "cpu"}
        crops = crop(loaders.load("native", reader, rows, workers=1), partial(draw, view, count=count), **settings)
        with closing(crops):
            got = list(crops)
    ours, theirs = [], []
    for a, b in zip(whole, got, strict=True):
        assert np.array_equal(a.indices, b.indices)
        params, size = draw(view, a, count), {"crop_px": crop_px}
        ours.append(views.apply(a.pixels, a.offsets, a.sizes, params, **size))
        theirs.append(views.apply(b.pixels, b.offsets, b.sizes, views.params_of_crops(params, **size), **size))
    return torch.cat(ours), torch.cat(theirs)


def test_all_of_more_than_two_views_are_cropped(betons: Betons) -> None:
    ours, theirs = both(betons, ViewConfig(area=(1, 1), ratio=(1, 1)), crop_px=SIDE, count=3)
    assert ours.shape == (3 * 3 * 7, 3, SIDE, SIDE)
    assert ours.equal(theirs)


def test_after_a_crop_that_changes_nothing_every_operation_is_ours(betons: Betons) -> None:
    ours, theirs = both(betons, ViewConfig(area=(1, 1), ratio=(1, 1), solarize=0.5), crop_px=SIDE)
    assert ours.shape == (3 * 2 * 7, 3, SIDE, SIDE)
    assert ours.equal(theirs)


@pytest.mark.parametrize("crop_px", [24, 57])
def test_crops_are_about_ours(betons: Betons, crop_px: int) -> None:
    ours, theirs = both(betons, ViewConfig(jitter=0, grayscale=0, blur=0), crop_px=crop_px)
    levels = 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1) * (ours - theirs).abs()
    assert levels.mean() < LEVELS_APART


def test_a_view_has_the_box_and_the_flip_that_were_drawn(betons: Betons) -> None:
    ours, theirs = both(betons, ViewConfig(), crop_px=24)
    assert torch.cdist(ours.flatten(1), theirs.flatten(1)).argmin(1).tolist() == list(range(len(ours)))


def test_crops_are_made_in_advance_by_a_thread_of_their_own(betons: Betons) -> None:
    threads: list[str] = []

    def draw_params(batch: Batch) -> ViewParams:
        threads.append(threading.current_thread().name)
        return draw(ViewConfig(), batch)

    with Reader(betons.train) as reader:
        rows = [*islice(stream(0, batch_size=8, count=len(reader), seed=0), 6)]
        loaded = loaders.load("native", reader, rows, workers=1)
        before = threading.active_count()
        with closing(loaders.crop_by_dali(loaded, draw_params, crop_px=24, workers=1, device="cpu")) as crops:
            next(crops)
            deadline = time.monotonic() + 20
            while len(threads) < 2 and time.monotonic() < deadline:  # more than was asked for
                time.sleep(0.01)
        assert len(threads) >= 2
        assert threading.current_thread().name not in threads
        assert threading.active_count() == before


def test_a_run_with_dalis_crop_begins_with_about_our_loss(betons: Betons, tmp_path: Path) -> None:
    losses = {}
    for crop in ("kernels", "dali"):
        asked = ["demo", f"--data={betons.train}", f"--out={tmp_path / crop}", "--device=cpu", "--batch-size=16"]
        assert main([*asked, "--epochs=0.2", "--warmup-epochs=0.1", "--log-every=1", f"--crop={crop}"]) == 0
        losses[crop] = [row["loss"] for row in read_metrics(RunFolder(tmp_path / crop).metrics)]
    assert len(losses["dali"]) == 2
    assert losses["dali"] == pytest.approx(losses["kernels"], rel=0.02)
    assert losses["dali"] != losses["kernels"]
