"""Laws of wrong input to fastbyol-train: one clear line and status 2, and nothing of an old run is lost."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastbyol.cli import eval as evaluation
from fastbyol.cli.train import main
from fastbyol.storage.checkpoint import MAGIC, TRAILER
from fastbyol.storage.run_folder import RunFolder
from tests.conftest import Betons, write_beton
from tests.support.layouts import draw
from tests.support.runs import arguments

TRAIN = (sys.executable, "-m", "fastbyol.train")


def status_of(asked: list[str]) -> int:
    """Run fastbyol-train in this process, also when argparse ends it."""
    try:
        return main(asked)
    except SystemExit as end:
        return int(str(end.code))


def test_a_refused_overwrite_leaves_the_old_run(betons: Betons, finished: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in finished.iterdir()}
    assert main(arguments(betons, finished, "--budget=1s", "--overwrite")) == 2
    assert {path.name: path.stat().st_mtime_ns for path in finished.iterdir()} == before


def test_a_new_run_removes_nothing_that_no_run_left(
    betons: Betons, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = [tmp_path / "mine" / name for name in ("checkpoints/best.ckpt", "scores/paper.csv", "result.json")]
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("of another program")
    assert main(arguments(betons, tmp_path / "mine", "--epochs=1", "--warmup-epochs=0")) == 2
    assert "holds no run, but result.json, checkpoints, scores, which a new run would remove" in capsys.readouterr().err
    assert all(path.read_text() == "of another program" for path in kept)


def test_images_of_ones_own_are_not_replaced_by_the_demo_set(
    betons: Betons, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = RunFolder(tmp_path / "run").demo_train
    own.parent.mkdir(parents=True)
    shutil.copy(betons.train, own)
    length = ("--batch-size=32", "--epochs=1", "--warmup-epochs=0", "--device=cpu", "--no-tensorboard")
    assert main(["demo", f"--out={tmp_path / 'run'}", *length]) == 2
    assert "train.beton is in the place of the demo set; give it by --data, or remove it" in capsys.readouterr().err
    assert main(["demo", f"--data={own}", f"--out={tmp_path / 'run'}", *length]) == 0
    assert own.read_bytes() == betons.train.read_bytes()


@pytest.mark.parametrize("text", ["", "{}", "[]"])
def test_a_damaged_outcome_is_one_clear_line(
    text: str, betons: Betons, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(shutil.copytree(finished, tmp_path / "run"))
    folder.result.write_text(text)
    again = arguments(betons, folder.path, f"--val={betons.val}", "--epochs=3", "--warmup-epochs=1", "--resume")
    assert main(again) == 2
    assert "result.json is damaged; restore it, or remove it" in capsys.readouterr().err
    assert evaluation.main(["knn", str(folder.path), f"--train={betons.train}", f"--val={betons.val}"]) == 2
    assert "result.json is damaged" in capsys.readouterr().err


def test_a_full_disk_ends_with_one_clear_line(betons: Betons, tmp_path: Path) -> None:
    limited = f"ulimit -f 200; exec {shlex.join([*TRAIN, *arguments(betons, tmp_path / 'run', '--epochs=1')])}"
    ended = subprocess.run(["bash", "-c", limited + " --warmup-epochs=0"], capture_output=True, text=True, check=False)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("\n") == 1
    assert "fastbyol-train: error: " in ended.stderr
    assert not list((tmp_path / "run").iterdir())


def occupied(betons: Betons, tmp_path: Path) -> list[str]:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    return arguments(betons, tmp_path / "run")


def truncated(betons: Betons, tmp_path: Path) -> list[str]:
    (tmp_path / "cut.beton").write_bytes(betons.train.read_bytes()[:5000])
    return ["demo", f"--data={tmp_path / 'cut.beton'}", f"--out={tmp_path / 'run'}"]


def foreign(_: Betons, tmp_path: Path) -> list[str]:
    (tmp_path / "letter.beton").write_text("Dear Sir or Madam, " * 100)
    return ["demo", f"--data={tmp_path / 'letter.beton'}", f"--out={tmp_path / 'run'}"]


def other_classes(betons: Betons, tmp_path: Path) -> list[str]:
    val = write_beton(tmp_path / "v.beton", 20, split="val")
    sidecar = Path(f"{val}.json")
    sidecar.write_text(sidecar.read_text().replace('"class_names": [', '"class_names": ["zebra", ', 1))
    return arguments(betons, tmp_path / "run", f"--val={val}")


def unwritable(betons: Betons, tmp_path: Path) -> list[str]:
    (tmp_path / "file").touch()
    return arguments(betons, tmp_path / "file" / "run")


BAD = {
    "missing file": (lambda b, t: ["demo", f"--data={t / 'none.beton'}", f"--out={t / 'run'}"], "none.beton"),
    "an empty path": (lambda b, t: arguments(b, t / "run", "--data="), "an empty path is given for images"),
    "flags in open quotes": (lambda b, t: arguments(b, t / "run", "--prep='--labels"), "wanted words as in a shell"),
    "not a beton": (foreign, "letter.beton"),
    "truncated beton": (truncated, "cut.beton"),
    "unwritable output": (unwritable, "file"),
    "unknown recipe": (lambda b, t: ["imagenet", f"--data={b.train}"], "imagenet_rn50"),
    "nothing at all": (lambda b, t: [], "RECIPE.*--help"),
    "unknown flag": (lambda b, t: [*arguments(b, t / "run"), "--bananas=8"], "--bananas=8"),
    "epochs in words": (lambda b, t: arguments(b, t / "run", "--epochs=many"), "--epochs"),
    "no data": (lambda b, t: ["cifar10_tiny"], "give --data"),
    "budget of bananas": (lambda b, t: arguments(b, t / "run", "--budget=8 bananas"), "8 bananas"),
    "budget too short": (lambda b, t: arguments(b, t / "run", "--budget=1s"), "longer --budget"),
    "endless epochs": (lambda b, t: arguments(b, t / "run", "--epochs=inf"), "epochs"),
    "a rate beyond float32": (lambda b, t: arguments(b, t / "run", "--base-lr=1e300"), "give a number from 0 to 1e.30"),
    "no place for a run": (lambda b, t: arguments(b, Path("/proc/r")), "/proc/r: No such file.*; check the path"),
    "endless rate": (lambda b, t: arguments(b, t / "run", "--base-lr=inf"), "base_lr"),
    "negative epochs": (lambda b, t: arguments(b, t / "run", "--epochs=-1"), "epochs"),
    "batch over dataset": (lambda b, t: arguments(b, t / "run", "--batch-size=161"), "160 images"),
    "batch of one": (lambda b, t: arguments(b, t / "run", "--batch-size=1"), "at least 2"),
    "unlabelled validation": (lambda b, t: arguments(b, t / "run", f"--val={b.unlabelled}"), "no labels"),
    "other classes": (other_classes, "different classes.*--classes-from .*train.beton|sidecar"),
    "folder in use": (occupied, "--overwrite"),
    "budget in the past": (lambda b, t: arguments(b, t / "run", "--budget=until 2001-01-01"), "leaves no time"),
    "scores without labels": (lambda b, t: arguments(b, t / "run", "--knn-at=0.5"), "give --val"),
    "score at the end": (lambda b, t: arguments(b, t / "run", f"--val={b.val}", "--knn-at=0.5,1"), "knn_at has 1.0"),
    "scores in words": (lambda b, t: arguments(b, t / "run", "--knn-at=often"), "'often'.*0.25,0.5"),
    "budget of no job": (lambda b, t: arguments(b, t / "run", "--budget=slurm"), "outside a Slurm job"),
    "ramp above full size": (lambda b, t: arguments(b, t / "run", "--crop-ramp=24"), "24 px"),
    "micro-batches of one": (lambda b, t: arguments(b, t / "run", "--micro-batches=32"), "at least 2 images"),
    "unequal micro-batches": (lambda b, t: arguments(b, t / "run", "--micro-batches=3"), "3 equal micro-batches"),
    "micro-batches and lag": (lambda b, t: arguments(b, t / "run", "--micro-batches=2", "--lagged-target"), "lagged"),
    "resume with another seed": (lambda b, t: ["demo"], "but seed was 0, is 7; give the old settings"),
    "resume with another batch": (lambda b, t: ["demo"], "but batch_size was 32, is 16; give the old settings"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_clear_line_and_status_2(
    case: str, betons: Betons, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build, expected = BAD[case]
    command: Callable[[Betons, Path], list[str]] = build
    asked = command(betons, tmp_path)
    if case.startswith("resume"):
        changed = "--seed=7" if case.endswith("seed") else "--batch-size=16"
        asked = arguments(
            betons, finished, f"--val={betons.val}", "--epochs=3", "--warmup-epochs=1", "--resume", changed
        )
    assert status_of(asked) == 2
    said = capsys.readouterr().err
    assert said.startswith("fastbyol-train: error: ")
    assert said.count("\n") == 1
    assert re.search(expected, said), said


def test_files_of_a_run_that_are_something_else_are_one_clear_line(
    betons: Betons, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    folder.result.unlink()
    (path,) = folder.checkpoints.iterdir()
    stream = io.BytesIO()
    torch.save({"a": 1}, stream)
    data = stream.getvalue()
    path.write_bytes(data + TRAILER.pack(MAGIC, len(data), hashlib.sha256(data).digest()))
    asked = arguments(betons, folder.path, f"--val={betons.val}", "--epochs=3", "--warmup-epochs=1", "--resume")
    assert main(asked) == 2
    said = capsys.readouterr().err
    assert "holds no state of a run (no 'images'); give --overwrite to start anew" in said
    assert said.count("\n") == 1
    folder.config.write_bytes(folder.config.read_text().replace("demo", "d\u00e9mo").encode("latin-1"))
    assert main(asked) == 2
    assert re.search(r"config\.json is not UTF-8; restore it, or give another --out\n", capsys.readouterr().err)


def test_class_names_that_are_no_utf8_train_and_are_shown(tmp_path: Path) -> None:
    names = {os.fsencode("a"): 8, "\u72d7".encode("gbk"): 8}
    for name, count in names.items():
        folder = tmp_path / "in" / os.fsdecode(name)
        folder.mkdir(parents=True)
        for number in range(count):
            (folder / f"{number}.png").write_bytes(draw(number, kind="PNG"))
    files = [f"--data={tmp_path / 'in'}", f"--val={tmp_path / 'in'}", f"--out={tmp_path / 'run'}"]
    assert main(["demo", *files, "--batch-size=8", "--epochs=1", "--warmup-epochs=0", "--device=cpu"]) == 0
    assert "\\udcb9\\udcb7" in RunFolder(tmp_path / "run").report.read_text()
