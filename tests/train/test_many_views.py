"""Laws of runs with more than two views of an image: bit-equal resume, images counted once, plan and report."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from fastbyol.cli.train import main
from fastbyol.config import Config, CropRamp
from fastbyol.errors import ConfigError
from fastbyol.monitor.flops import train_flops_per_image
from fastbyol.monitor.metrics import read_metrics
from fastbyol.recipes import named
from fastbyol.recipes.methods import choices
from fastbyol.schedule import relative_cost
from fastbyol.storage.run_folder import RunFolder
from fastbyol.system.threads import ThreadTuner
from fastbyol.train import memory
from fastbyol.train.method import step_s
from tests.conftest import Betons
from tests.support.commands import Fork, wait_until
from tests.support.runs import arguments, encoders_are_equal, learned

RECIPES = ["demo+global_views=3", "demo+local_views=3+local_predictor=true"]


@pytest.fixture(scope="module", params=RECIPES, ids=["global", "local"])
def recipe(request: pytest.FixtureRequest) -> str:
    """Give a recipe of more than two views."""
    name: str = request.param
    return name


def asked(recipe: str, betons: Betons, out: Path) -> list[str]:
    _, *rest = arguments(betons, out, f"--val={betons.val}", "--epochs=2", "--warmup-epochs=1")
    return [recipe, *rest]


@pytest.fixture(scope="module")
def whole(recipe: str, betons: Betons, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train two epochs without interruption."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(asked(recipe, betons, out)) == 0
    return out


def test_a_resumed_run_has_the_same_bits(recipe: str, betons: Betons, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = Fork(tmp_path / "said", *asked(recipe, betons, out), "--checkpoint-every=0.01s")
    wait_until(lambda: len(read_metrics(RunFolder(out).metrics)) >= 3, process)
    process.send_signal(signal.SIGHUP)
    _, said = process.communicate()
    assert process.returncode == 75, said
    assert main([*asked(recipe, betons, out), "--resume"]) == 0
    assert encoders_are_equal(whole, out)
    assert learned(out) == learned(whole)


def test_images_are_counted_once_whatever_the_views(whole: Path) -> None:
    result = json.loads(RunFolder(whole).result.read_text())
    assert (result["steps"], result["images"]) == (10, 320)
    rows = read_metrics(RunFolder(whole).metrics)
    assert rows[-1]["epoch"] == 2
    assert rows[-1]["images_per_s"] * rows[-1]["interval_s"] == pytest.approx(32, rel=0.01)


def test_the_report_shows_every_view(recipe: str, whole: Path) -> None:
    page = RunFolder(whole).report.read_text()
    if recipe == RECIPES[0]:
        said = ["<span>view 3</span>", "3 of 24 px", "views 1, 3"]
    else:
        said = ["<span>local view 5</span>", "2 of 24 px, 3 of 8 px", "views 3, 5", "a predictor of their own"]
    assert all(text in page for text in said)


def test_another_number_of_views_is_another_run(
    recipe: str, betons: Betons, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments_of_two = ["demo", *asked(recipe, betons, whole)[1:]]
    assert main([*arguments_of_two, "--resume"]) == 2
    assert "views were" in capsys.readouterr().err


def test_cost_grows_with_the_views() -> None:
    two, four = named("cifar10_tiny"), named("cifar10_tiny+global_views=4")
    assert train_flops_per_image(four, crop_px=32) == 2 * train_flops_per_image(two, crop_px=32)
    needed = [memory.step_bytes(recipe, images=64, precision="float32") for recipe in (two, four)]
    weights = memory.step_bytes(two, images=2, precision="float32")
    assert needed[1] - weights == pytest.approx(2 * (needed[0] - weights), rel=0.1)


def test_local_views_cost_the_online_network_alone() -> None:
    two, more = named("cifar10_tiny"), named("cifar10_tiny+local_views=4")
    flops, with_local, without_target = (
        train_flops_per_image(recipe, crop_px=px)
        for recipe, px in ((two, 24), (more, 24), (named("cifar10_tiny+target=stop-gradient"), 8))
    )
    assert with_local == flops + 2 * without_target
    needed = [memory.step_bytes(recipe, images=64, precision="float32") for recipe in (two, more)]
    assert needed[0] < needed[1] < 2 * needed[0]


def test_a_crop_ramp_saves_nothing_on_local_views() -> None:
    ramp = CropRamp((16,), until=0.5)
    assert relative_cost(replace(named("cifar10_rn18"), crop_ramp=ramp)) == 0.5 * 0.25 + 0.5
    cost = 0.5 * (2 * 256 + 4 * 256) / (2 * 1024 + 4 * 256) + 0.5
    assert relative_cost(replace(named("cifar10_rn18+local_views=4"), crop_ramp=ramp)) == pytest.approx(cost)


def test_a_step_is_measured_with_all_views(recipe: str, betons: Betons) -> None:
    config = Config(named(recipe), data=str(betons.train), epochs=1.0, device="cpu")
    assert step_s(config, ThreadTuner(), images=8, left_s=60.0) > 0


def test_auto_says_that_its_methods_have_two_views() -> None:
    with pytest.raises(ConfigError, match=r"may choose SimCLR.*negatives .* with 4 views"):
        choices(named("cifar10_tiny+global_views=4"))
