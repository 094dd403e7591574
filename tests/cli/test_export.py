"""Laws of fastbyol-eval export: the format follows the suffix, a folder is ready for timm and a hub, with its card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fastbyol.cli.embed import main as embed
from fastbyol.cli.eval import main
from fastbyol.cli.train import main as train
from fastbyol.export import load_encoder
from fastbyol.storage.run_folder import RunFolder
from tests.conftest import Betons

STANDARD = "demo+arch=resnet18+width=1+stem=imagenet+hidden=16"


@pytest.fixture(scope="module")
def run(betons: Betons, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train one epoch and score it within the run."""
    out = tmp_path_factory.mktemp("export") / "run"
    asked = [f"--data={betons.train}", f"--val={betons.val}", f"--out={out}", "--batch-size=32", "--device=cpu"]
    assert train(["demo", *asked, "--epochs=1", "--warmup-epochs=0"]) == 0
    return out


@pytest.fixture(scope="module")
def standard(betons: Betons, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Take a step with a network that timm has a name for."""
    out = tmp_path_factory.mktemp("standard") / "run"
    asked = [f"--data={betons.train}", f"--out={out}", "--batch-size=8", "--device=cpu", "--epochs=0.05"]
    assert train([STANDARD, *asked, "--warmup-epochs=0"]) == 0
    return out


@pytest.mark.parametrize("name", ["config.json", "encoder.safetensors", "new.pth", "checkpoints/new.pth"])
def test_an_export_keeps_out_of_the_run_folder(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    assert main(["export", str(run), str(run / name), "--format=pth"]) == 2
    assert "give a path in another folder" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before


def test_an_export_keeps_out_of_the_folders_of_other_runs(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    before = sorted(other.iterdir())
    assert main(["export", str(run), str(other)]) == 2
    assert "the folder of another run, and the export would be taken for its encoder" in capsys.readouterr().err
    assert sorted(other.iterdir()) == before


def test_the_card_of_a_run_with_a_deadline_says_so(run: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(run, tmp_path / "run")
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "epochs": None, "deadline": 1.8e9}))
    assert main(["export", str(copied), str(tmp_path / "out" / "e.pth"), "--format=pth"]) == 0
    card = (tmp_path / "out" / "model-card.md").read_text()
    assert "| budget | until 2027-01-" in card
    assert "--epochs 1 " in card


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_an_export_brings_its_model_card(
    kind: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), str(tmp_path / f"out.{kind}"), f"--format={kind}"]) == 0
    assert "model-card.md" in capsys.readouterr().out
    card = (tmp_path / "model-card.md").read_text()
    result = json.loads((run / "result.json").read_text())
    assert f"{result['knn_top1']:.2f} %" in card
    assert (run / "config.json").read_text().strip() in card
    assert "fastbyol-train demo --data train.beton" in card
    assert str(run) not in card


def unfinished(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("result.json", "encoder.safetensors"))
    return tmp_path / "copy"


@pytest.mark.parametrize("words", ["e.safetensors", "e.safetensors --format=timm", "e.pth", "e.bin --format=timm"])
def test_a_file_is_what_its_suffix_says(words: str, standard: Path, tmp_path: Path) -> None:
    name, *asked = words.split()
    assert main(["export", str(standard), str(tmp_path / name), *asked]) == 0
    wanted = load_encoder(standard).state_dict()
    if name.endswith(".safetensors"):
        with safe_open(tmp_path / name, "pt") as file:
            found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    else:
        found = torch.load(tmp_path / name, weights_only=True)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert (tmp_path / "config.json").exists() == bool(asked)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("e.pth --format=safetensors", "e.pth is a file for torchvision and timm by its suffix, but --format is safe"),
        ("e.safetensors --format=onnx", "give a name in .onnx, or --format safetensors"),
        ("e.h5", "e.h5 ends in .h5; wanted a name in .safetensors, .pth, .pt, .bin, .pkl, .onnx, or a folder, as in"),
        ("e.h5 --format=pth", "wanted a name in .pth, .pt, .bin, or a folder"),
        ("plain", "plain is a file without a suffix"),
        ("project", "README.md is there already and comes from no export; give another folder"),
        ("project/e.pth --format=timm", "config.json is there already and comes from no export"),
    ],
)
def test_a_wrong_name_is_one_line_and_nothing_is_written(
    words: str, said: str, standard: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plain").touch()
    (tmp_path / "project").mkdir()
    for name in ("README.md", "config.json"):
        (tmp_path / "project" / name).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    name, *asked = words.split()
    assert main(["export", str(standard), str(tmp_path / name), *asked]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_is_ready_for_timm_and_a_hub(
    standard: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new" / "tiny"
    for _ in range(2):  # what an export wrote, the next replaces
        assert main(["export", str(standard), str(folder)]) == 0
    assert f"hf upload OWNER/NAME {folder}" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n")
    assert 'timm.create_model("local-dir:tiny", pretrained=True)' in card
    assert str(Path(RunFolder(standard).read_config().data).parent) not in card
    described = json.loads((folder / "config.json").read_text())
    assert described["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert described["pretrained_cfg"]["crop_pct"] == 1.0
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_encoder(folder)(images), load_encoder(standard)(images))


def test_a_folder_has_no_timm_layout_for_a_network_that_timm_lacks(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), f"{tmp_path}/e.v2/"]) == 0
    assert sorted(path.name for path in (tmp_path / "e.v2").iterdir()) == ["README.md", "model.safetensors"]
    assert "library_name: fastbyol" in (tmp_path / "e.v2" / "README.md").read_text()
    assert main(["export", str(run), f"{tmp_path}/p", "--format=pth"]) == 0
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["README.md", "model.pth"]
    assert main(["export", str(run), f"{tmp_path}/t", "--format=timm"]) == 2


def test_each_of_two_files_has_its_card(run: Path, tmp_path: Path) -> None:
    for name in ("a.pth", "b.safetensors", "a.pth"):
        assert main(["export", str(run), str(tmp_path / name)]) == 0
    assert (tmp_path / "model-card.md").read_text().startswith("# a.pth\n")
    assert (tmp_path / "b.safetensors.model-card.md").read_text().startswith("# b.safetensors\n")


def test_the_card_keeps_a_score_for_each_validation_file(
    betons: Betons, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copy(betons.val, tmp_path / "test.beton")
    shutil.copytree(run, tmp_path / "run")
    for words in ([f"--val={betons.val}"], [f"--val={other}"], [f"--val={other}", "--bank=40"]):
        assert main(["knn", str(tmp_path / "run"), f"--train={betons.train}", *words]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out" / "e.pth")]) == 0
    capsys.readouterr()
    rows = (tmp_path / "out" / "model-card.md").read_text().split("\n")
    found = [[cell.strip() for cell in row.split("|")] for row in rows if row.startswith("| knn")]
    assert sorted((cells[1], *cells[-3:-1]) for cells in found) == [
        ("knn", "train.beton", "test.beton"),
        ("knn", "train.beton", "val.beton"),
        ("knn, bank of 40", "train.beton", "test.beton"),
    ]


def test_an_unfinished_run_is_exported_and_embedded_from_its_checkpoint(
    betons: Betons, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = unfinished(run, tmp_path)
    capsys.readouterr()
    assert main(["export", str(folder), str(tmp_path / "e.safetensors"), "--json"]) == 0
    ended = capsys.readouterr()
    assert json.loads(ended.out)["unfinished"] == {"step": 5, "progress": 1.0}
    assert f"the run in {folder} has not finished: this is its encoder after step 5" in ended.err
    assert "**not finished**: step 5, 100% of the run" in (tmp_path / "model-card.md").read_text()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_encoder(tmp_path / "e.safetensors")(images), load_encoder(run)(images))
    for name, source in (("a.npy", folder), ("b.npy", run)):
        assert embed([str(source), str(betons.val), f"--out={tmp_path / name}", "--device=cpu", "--workers=1"]) == 0
    assert "has not finished" in capsys.readouterr().err
    assert main(["export", str(run), str(tmp_path / "folder")]) == 0
    again = [str(tmp_path / "folder"), str(betons.val), f"--out={tmp_path / 'c.npy'}", "--device=cpu", "--px=32"]
    assert embed([*again, "--workers=1"]) == 0
    assert (tmp_path / "c.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
