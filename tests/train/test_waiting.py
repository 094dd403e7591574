"""Laws of the measure of waiting: every loader trains the images asked for, and no run is short of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.cases import waiting
from benchmarks.cases.compare import WrongResult
from benchmarks.cases.photographs import Job, Photographs
from fastbyol.config import EncoderConfig, HeadConfig
from fastbyol.recipes import named
from tests.conftest import Betons

LOADERS = [("native", None), ("memory", None), ("memory", 16)]


def test_cases_of_one_size_compete_with_steps_that_never_wait(betons: Betons) -> None:
    cases = list(waiting.cases(Photographs(betons.train, None), LOADERS, workers=2))
    assert len({case.question for case in cases}) == 1
    assert [case.implementation for case in cases] == [
        "no loader: views, step",
        "fastbyol native: load, views, step",
        "fastbyol memory: load, views, step",
        "fastbyol memory, 16 px: load, views, step",
    ]
    assert {case.images for case in cases} == {waiting.BATCH * waiting.STEPS}


def test_steps_behind_a_loader_train_the_images_asked_for(betons: Betons) -> None:
    encoder, head = EncoderConfig("resnet18", 0.125, "cifar"), HeadConfig(8, 4)
    recipe = replace(named("demo"), encoder=encoder, head=head, batch_size=4, crop_px=16)
    job = Job(Photographs(betons.unlabelled, None), "as stored", 1, 4, 2, "cpu")
    waiting.idle(recipe, job).run()
    for name, side in LOADERS:
        waiting.behind(name, side, recipe, job).run()
    with pytest.raises(WrongResult, match="0 of 8 images came"):
        waiting._run(lambda _: None, iter([]), job)
