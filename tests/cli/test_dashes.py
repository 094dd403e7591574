"""Laws of names that begin with a dash: taken as paths, and printed so that what is pasted works."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest

from fastbyol.ablations.paper import Cell
from fastbyol.ablations.runs import Job, score_linear
from fastbyol.cli import embed, export_run
from fastbyol.cli import eval as evaluation
from fastbyol.cli import train as training
from fastbyol.cli.cache import Cache
from fastbyol.cli.train_run import draw_demo_set
from fastbyol.config import Config, to_json
from fastbyol.errors import ConfigError
from fastbyol.recipes import named
from fastbyol.storage.run_folder import RunFolder
from fastbyol.system.shell import operand, quoted
from tests.conftest import Betons
from tests.support.layouts import draw, lay_out

TRAIN = ("--batch-size=8", "--epochs=1", "--warmup-epochs=0", "--device=cpu", "--no-tensorboard")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder of its own, as only a relative path begins with a dash."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_path_is_no_flag_and_an_address_stays() -> None:
    assert [operand(Path("-x")), operand("--data")] == ["./-x", "./--data"]
    for place in ("x-y", "/-x", "s3://bucket/-x"):
        assert operand(place) == place
    assert quoted("-a b") == "'./-a b'"


def test_images_are_converted_from_and_to_such_folders(here: Path) -> None:
    lay_out(here / "-photos", {f"{number}.jpg": draw(number) for number in range(3)})
    converted = Cache(Path("-cache")).beton("-photos")
    assert Path(converted).is_file()
    assert Path(converted).parent == Path("-cache")


def test_the_demo_set_is_drawn_into_such_a_folder() -> None:
    folder = RunFolder(Path("-run"))
    draw_demo_set(folder)
    assert folder.demo_train.is_file()
    assert folder.demo_val.is_file()


@pytest.mark.parametrize("is_scored", [True, False])
def test_the_command_at_the_end_of_a_training_works(
    is_scored: bool, here: Path, betons: Betons, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(betons.train, here / "-train.beton")
    shutil.copy(betons.val, here / "-val.beton")
    scored = ["--val=-val.beton"] if is_scored else []
    assert training.main(["demo", "--data=-train.beton", "--out=-run", *scored, *TRAIN]) == 0
    command, *words = shlex.split(capsys.readouterr().out.partition("next: ")[2])
    if is_scored:
        assert command == "fastbyol-eval"
        args, _ = evaluation.parse(words)
        assert (args.encoder, args.train, args.val) == ("./-run", "./-train.beton", "./-val.beton")
    else:
        assert command == "fastbyol-embed"
        assert embed.main([*words, "--device=cpu"]) == 0


def test_commands_that_are_printed_name_such_folders_as_paths(
    betons: Betons, capsys: pytest.CaptureFixture[str]
) -> None:
    assert training.main(["demo", f"--data={betons.train}", "--epochs=1", "--save-config=-a b.toml"]) == 0
    words = shlex.split(capsys.readouterr().out.partition("; ")[2])
    assert words[:3] == ["fastbyol-train", "--config", "./-a b.toml"]
    written = {"protocol": "export", "file": "-to hub/model.safetensors", "model_card": "-to hub/README.md"}
    assert export_run.summary(written).endswith("hf upload OWNER/NAME './-to hub'")


def test_a_run_of_a_table_in_such_a_folder_is_found(betons: Betons) -> None:
    job = Job(Cell("", ""), 0, Path("-table") / "seed0", ())
    job.path.mkdir(parents=True)
    config = Config(named("demo"), data=str(betons.train), val=str(betons.val), epochs=1.0)
    job.folder.config.write_text(to_json(config))
    with pytest.raises(ConfigError, match="-table/seed0 has not finished"):
        score_linear(job, on_progress=lambda progress: None)


def test_a_flag_of_prep_is_given_with_its_quotes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        training.main(["demo", "--labels-from", "my labels.csv"])
    said = capsys.readouterr().err.partition("give it as ")[2].partition("; see")[0]
    given = training.build_parser().parse_args(training.join_prep(["demo", *shlex.split(said)]))
    assert given.prep == ["--labels-from", "my labels.csv"]
