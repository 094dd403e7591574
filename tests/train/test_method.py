"""Laws of --method auto in a run: the recipe it chose is the run's own, also when it is resumed."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from fastbyol.cli.train import main
from fastbyol.config import Config
from fastbyol.errors import ConfigError
from fastbyol.recipes import named
from fastbyol.recipes.methods import variants
from fastbyol.storage.run_folder import RunFolder
from fastbyol.system.threads import ThreadTuner
from fastbyol.train.method import adopt, step_s
from tests.conftest import Betons
from tests.support.runs import arguments


def test_auto_trains_by_what_it_chose_and_resumes_it(
    betons: Betons, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = arguments(betons, tmp_path / "run", "--epochs=1", "--warmup-epochs=0", "--method=auto")
    assert main(asked) == 0
    config = RunFolder(tmp_path / "run").read_config()
    assert config.recipe.objective.beta == 1
    assert f"the same as recipe {config.recipe.name}" in capsys.readouterr().err
    assert main([*asked, "--resume"]) == 0
    assert main([*asked, "--resume", "--seed=1"]) == 2
    assert main([argument for argument in asked if argument != "--method=auto"] + ["--resume"]) == 2


def test_only_a_variant_of_the_same_recipe_is_adopted(betons: Betons, tmp_path: Path) -> None:
    assert main(arguments(betons, tmp_path / "run", "--epochs=1", "--warmup-epochs=0")) == 0
    config = replace(RunFolder(tmp_path / "run").read_config(), method="auto")
    for variant in variants(config.recipe):
        assert adopt(config, replace(config, recipe=variant)).recipe == variant
    assert adopt(config, replace(config, recipe=named("cifar10_tiny"))) == config


def test_a_slow_step_ends_the_measurement(betons: Betons) -> None:
    config, numbers = Config(named("demo"), data=str(betons.train), epochs=1.0, device="cpu"), list[int]()

    def measured_s(left_s: float) -> float:
        tuner = ThreadTuner((1, 2), set_threads=numbers.append, other_cpu_s=lambda: 0.0, cores=2)
        return step_s(config, tuner, images=8, left_s=left_s)

    assert measured_s(math.inf) > 0
    assert set(numbers) == {1, 2}  # numbers of threads are tried, as in training
    for left_s in (1e-9, 0.0):  # the latter where the budget is used up
        numbers.clear()
        assert measured_s(left_s) > 0
        assert numbers == [1]  # one step alone


def test_the_warm_up_that_counts_is_that_of_the_choice(
    betons: Betons, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten epochs are no more than the recipe's own warm-up, and ten times that of what is chosen."""
    asked = ["cifar10_rn18", f"--data={betons.train}", f"--out={tmp_path / 'run'}", "--device=cpu", "--epochs=10"]
    assert main([*asked, "--plan"]) == 2
    assert "not more than the 10 epochs of warm-up" in capsys.readouterr().err
    config = Config(named("cifar10_rn18"), data=str(betons.train), epochs=10, method="auto", device="cpu")
    (chosen, own) = variants(config.recipe)
    replace(config, recipe=chosen).check_warmup()
    with pytest.raises(ConfigError, match="not more than the 10 epochs of warm-up"):
        replace(config, recipe=own).check_warmup()
    unmeasured = ["imagenette_rn18", *asked[1:-1], "--epochs=5", "--batch-size=32", "--method=auto", "--plan"]
    assert main(unmeasured) == 2
    assert "epochs is 5, not more than the 10 epochs of warm-up" in capsys.readouterr().err


def test_data_smaller_than_the_batch_of_a_choice_are_told(
    betons: Betons, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["cifar10_tiny", f"--data={betons.train}", f"--out={tmp_path / 'run'}", "--device=cpu", "--threads=1"]
    assert main([*asked, "--epochs=2", "--warmup-epochs=1", "--method=auto", "--plan"]) == 0
    assert "takes batches of 256 images, and there are 160" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "flag"),
    [
        ("cifar10_tiny", "--batch-size=64"),
        ("cifar10_tiny", "--optimizer=lars"),
        ("cifar10_rn18", "--warmup-epochs=10"),
    ],
)
@pytest.mark.parametrize("way", ["--plan=80", "--plan", "--save-config={}"])
def test_a_flag_that_a_choice_would_change_is_refused_where_it_says_what_the_recipe_has(
    recipe: str, flag: str, way: str, betons: Betons, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [recipe, f"--data={betons.train}", "--device=cpu", "--epochs=11", way.format(tmp_path / "run.toml")]
    assert main([*asked, "--method=auto", flag]) == 2
    setting = flag.removeprefix("--").partition("=")[0].replace("-", "_")
    assert f"sets {setting}, and so do you; leave that out, or --method auto" in capsys.readouterr().err
    (tmp_path / "auto.toml").write_text(f'method = "auto"\nrecipe = "{recipe}"\n')
    assert main(["--config", str(tmp_path / "auto.toml"), *asked[1:], flag]) == 2
    assert f"sets {setting}, and so do you" in capsys.readouterr().err


def test_the_plan_of_memory_lists_all_that_auto_may_choose(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cifar10_tiny", "--method=auto", "--plan=80"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [each.name for each in variants(named("cifar10_tiny"))]
    assert main(["cifar10_tiny", "--method=auto", "--plan=80", "--optimizer=sgd"]) == 2
