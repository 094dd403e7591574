"""Laws of images that are no .beton: converted once, again when they change, with the same classes, in the budget."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastbyol.beton import Reader
from fastbyol.cli import eval as evaluation
from fastbyol.cli.cache import Cache
from fastbyol.cli.train import main
from fastbyol.errors import ConfigError
from fastbyol.storage.run_folder import RunFolder
from tests.conftest import Betons
from tests.support.commands import Fork, wait_until
from tests.support.layouts import draw, lay_out

TRAIN = ("--epochs=1", "--warmup-epochs=0", "--batch-size=8", "--device=cpu", "--no-tensorboard")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Lay out eight training images of three classes, and four validation images of two of them."""
    names = [f"train/{'abc'[i % 3]}/{i}.jpg" for i in range(8)] + [f"val/{'ac'[i % 2]}/{i}.png" for i in range(4)]
    return lay_out(
        tmp_path / "photos", {name: draw(i, kind="PNG" if "png" in name else "JPEG") for i, name in enumerate(names)}
    )


def test_a_folder_is_trained_on_and_scored_and_converted_once(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs" / "first"
    files = [f"--data={folder / 'train'}", f"--val={folder / 'val'}"]
    assert main(["demo", *files, f"--out={out}", *TRAIN]) == 0
    said = capfd.readouterr().err
    assert re.search(r"^fastbyol-train: .*/runs/cache/train-[0-9a-f]{8}\.beton: 8 images, 3 classes, ", said)
    assert re.search(r"val-[0-9a-f]{8}\.beton: 4 images, 3 classes, ", said)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "cache").glob("*.beton")}
    assert len(written) == 2
    config = RunFolder(out).read_config()
    with Reader(config.data) as train, Reader(config.val or "") as val:
        assert train.class_names == val.class_names == ["a", "b", "c"]
        assert sorted(set((val.labels if val.labels is not None else []).tolist())) == [0, 2]
    assert main(["demo", *files, f"--out={tmp_path / 'runs' / 'second'}", *TRAIN]) == 0
    assert "train-" in (said := capfd.readouterr().err)
    assert "8 images, unchanged since it was written" in said
    asked = [f"--train={folder / 'train'}", f"--val={folder / 'val'}", "--k", "3", "--json"]
    assert evaluation.main(["knn", str(out), *asked]) == 0
    assert json.loads(capfd.readouterr().out)["train"] == config.data
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "cache").glob("*.beton")} == written


def test_a_source_that_changed_is_converted_again(folder: Path, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    path = Path(cache.beton(str(folder / "train")))

    def names_and_time() -> tuple[int, int]:
        with Reader(path) as reader:
            return len(reader), path.stat().st_mtime_ns

    first = names_and_time()
    (folder / "train" / "a" / "new.jpg").write_bytes(draw(99))
    assert cache.beton(str(folder / "train")) == str(path)
    second = names_and_time()
    assert (first[0], second[0]) == (8, 9)
    (folder / "train" / "a" / "new.jpg").write_bytes(draw(98))  # as many images, another one
    os.utime(folder / "train" / "a" / "new.jpg", ns=(1, 1))
    cache.beton(str(folder / "train"))
    assert names_and_time()[1] > second[1]
    smaller = Cache(tmp_path / "cache", ("--max-side", "16")).beton(str(folder / "train"))
    assert smaller != str(path)
    with Reader(smaller) as reader:
        assert reader.widths.max() == 16


def test_a_beton_under_any_name_is_taken_as_it_is(betons: Betons, tmp_path: Path) -> None:
    shutil.copy(betons.train, tmp_path / "train.ffcv")
    cache = Cache(tmp_path / "cache")
    for path in (betons.train, tmp_path / "train.ffcv", tmp_path / "missing.beton"):
        assert cache.beton(str(path)) == str(path)
    assert not (tmp_path / "cache").exists()


def test_processes_that_ask_at_once_convert_once(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from fastbyol.cli.cache import Cache; "
        "print(Cache(Path(sys.argv[1])).beton(sys.argv[2]))"
    )
    asked = [sys.executable, "-c", code, tmp_path / "cache", folder / "train"]
    with ThreadPoolExecutor(3) as pool:
        ended = list(pool.map(lambda _: subprocess.run(asked, capture_output=True, text=True, check=True), range(3)))
    assert len({each.stdout for each in ended}) == 1
    assert sorted("unchanged" in each.stderr for each in ended) == [False, True, True]


def test_what_cannot_be_converted_is_said_by_prep_and_ends_with_status_2(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", f"--data={folder}", f"--out={tmp_path / 'run'}", *TRAIN]) == 2
    first, second = capfd.readouterr().err.splitlines()
    assert re.match(r"fastbyol-prep: error: .*train and val look like parts of one data set", first)
    assert re.match(r"fastbyol-train: error: .*photos cannot be used, as said above", second)
    given = ["--prep", "--labels none --max-side 24"]
    assert main(["demo", f"--data={folder}", f"--out={tmp_path / 'run'}", *given, *TRAIN]) == 0


def test_the_budget_holds_for_a_conversion_too(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="could not be converted within the budget; give a longer --budget"):
        Cache(tmp_path / "cache", left_s=0.01).beton(str(folder / "train"))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_signal_while_images_are_converted_leaves_nothing_behind(tmp_path: Path) -> None:
    many = lay_out(tmp_path / "many", {"0.jpg": draw(0, side=3000)})
    for number in range(1, 300):
        (many / f"{number}.jpg").symlink_to(many / "0.jpg")
    process = Fork(tmp_path / "said", "demo", f"--data={many}", f"--out={tmp_path / 'runs' / 'run'}", *TRAIN)
    wait_until(lambda: any((tmp_path / "runs" / "cache").glob(".*.partial")), process)
    wait_until(lambda: "is converted, once, to" in (tmp_path / "said").read_text(), process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 75, said
    assert "fastbyol-train: interrupted; continue with the same command" in said
    assert [path.suffix for path in (tmp_path / "runs" / "cache").iterdir()] == [".lock"]
