"""Laws of loader ffcv that no other loader needs: its thread's death is raised, other sizes are not scaled."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from fastbyol.beton import Reader
from tests.conftest import Betons

pytestmark = pytest.mark.peers
pytest.importorskip("ffcv")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_ffcv_thread_raises_in_the_main_thread(betons: Betons) -> None:
    from fastbyol.loaders import ffcv  # noqa: PLC0415

    with Reader(betons.train) as reader:
        loader = ffcv._loader(reader, workers=1)
        epoch = ffcv.Epoch(loader, np.array(["no number"] * 64))
        with pytest.raises(RuntimeError, match="ffcv's thread died"):
            next(iter(epoch.results()))
        epoch.close()
        epoch.join()


def test_an_iteration_that_ends_early_raises(betons: Betons, monkeypatch: pytest.MonkeyPatch) -> None:
    from ffcv.loader.epoch_iterator import EpochIterator  # noqa: PLC0415

    from fastbyol import loaders  # noqa: PLC0415
    from fastbyol.order import stream  # noqa: PLC0415

    begin = EpochIterator.__init__
    monkeypatch.setattr(EpochIterator, "__init__", lambda self, loader, order: begin(self, loader, order[:-3]))
    with Reader(betons.train) as reader:
        rows = list(islice(stream(0, batch_size=20, count=len(reader), seed=0), 4))
        with closing(loaders.load("ffcv", reader, rows, workers=1)) as batches:
            assert [next(batches).indices.tolist() for _ in range(3)] == [each.indices.tolist() for each in rows[:3]]
            with pytest.raises(RuntimeError, match=f"ended its iteration before sample {rows[3].indices[-3]} "):
                next(batches)


@pytest.mark.parametrize("taken", [1, 3, 40])
def test_an_iteration_can_be_ended_whatever_its_thread_waits_for(betons: Betons, taken: int) -> None:
    """Its queue is full after two chunks, before its last word, or between them."""
    from fastbyol.loaders import ffcv  # noqa: PLC0415

    with Reader(betons.train) as reader:
        loader = ffcv._loader(reader, workers=1)
        for chunks in (1, 2, 3, 40):
            images = ffcv._images(loader, np.arange(chunks * ffcv.CHUNK_IMAGES, dtype=np.uint64) % len(reader))
            assert len(list(islice(images, taken))) == taken
            time.sleep(0.1)  # the thread runs ahead as far as it can
            images.close()
            assert not any(isinstance(each, ffcv.Epoch) for each in threading.enumerate())


def test_labels_come_from_the_file_and_other_fields_are_not_decoded(tmp_path: Path) -> None:
    from ffcv.fields import FloatField, IntField, RGBImageField  # noqa: PLC0415
    from ffcv.writer import DatasetWriter  # noqa: PLC0415

    from fastbyol import loaders  # noqa: PLC0415
    from fastbyol.order import Rows  # noqa: PLC0415

    class Samples:
        def __len__(self) -> int:
            return 20

        def __getitem__(self, index: int) -> tuple[float, int, np.ndarray]:
            return float(index), 7 * index, np.full((16 + index, 8, 3), index, np.uint8)

    fields = {"weight": FloatField(), "label": IntField(), "photo": RGBImageField(write_mode="raw")}
    path = tmp_path / "theirs.beton"
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(Samples())
    with Reader(path) as reader:
        rows = Rows(np.array([19, 3, 3, 0]), np.zeros(4, np.int64))
        (batch,) = loaders.load("ffcv", reader, [rows], workers=2)
    assert batch.labels is not None
    assert batch.labels.tolist() == [133, 21, 21, 0]
    for place, index in enumerate(rows.indices.tolist()):
        height, width = batch.sizes[place].tolist()
        assert (height, width) == (16 + index, 8)
        begin = int(batch.offsets[place])
        assert (batch.pixels[begin : begin + height * width * 3] == index).all()
