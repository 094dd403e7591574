"""Laws of images that are no .beton: converted once, again when they change, with the same classes, in the budget."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastbyol.beton import Reader
from fastbyol.cli import eval as evaluation
from fastbyol.cli.cache import Cache, is_conversion_of
from fastbyol.cli.train import main
from fastbyol.errors import ConfigError
from fastbyol.storage import checkpoint
from fastbyol.storage.run_folder import RunFolder
from tests.conftest import Betons
from tests.support.commands import Fork, wait_until
from tests.support.layouts import draw, lay_out
from tests.support.web import Web

TRAIN = ("--warmup-epochs=0", "--batch-size=8", "--device=cpu", "--no-tensorboard")


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
    assert main(["demo", *files, f"--out={out}", *TRAIN, "--epochs=1"]) == 0
    said = capfd.readouterr().err
    assert re.search(
        r"(?m)^fastbyol-train: .*/runs/cache/train-[0-9a-f]{12}\.beton: 8 images, 3 classes \(a to c\), ", said
    )
    assert re.search(r"val-[0-9a-f]{12}\.beton: 4 images, 3 classes \(a to c\), ", said)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "cache").glob("*.beton")}
    assert len(written) == 2
    config = RunFolder(out).read_config()
    with Reader(config.data) as train, Reader(config.val or "") as val:
        assert train.class_names == val.class_names == ["a", "b", "c"]
        assert sorted(set((val.labels if val.labels is not None else []).tolist())) == [0, 2]
    assert main(["demo", *files, f"--out={tmp_path / 'runs' / 'second'}", *TRAIN, "--epochs=1"]) == 0
    assert "train-" in (said := capfd.readouterr().err)
    assert "8 images, unchanged since it was written" in said
    asked = [f"--train={folder / 'train'}", f"--val={folder / 'val'}", "--k", "3", "--json"]
    assert evaluation.main(["knn", str(out), *asked]) == 0
    assert json.loads(capfd.readouterr().out)["train"] == config.data
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "cache").glob("*.beton")} == written


def test_a_source_that_changed_is_converted_again_beside_the_old_file(folder: Path, tmp_path: Path) -> None:
    cache, source = Cache(tmp_path / "cache"), str(folder / "train")

    def images_of(path: str) -> int:
        with Reader(path) as reader:
            return len(reader)

    first = cache.beton(source)
    (folder / "train" / "a" / "new.jpg").write_bytes(draw(99))
    second = cache.beton(source)
    (folder / "train" / "a" / "new.jpg").write_bytes(draw(98))  # as many images, another one
    os.utime(folder / "train" / "a" / "new.jpg", ns=(1, 1))
    third = cache.beton(source)
    smaller = Cache(tmp_path / "cache", ("--max-side", "16")).beton(source)
    assert [images_of(path) for path in (first, second, third, smaller)] == [8, 9, 9, 9]
    assert len({first, second, third, smaller}) == 4
    assert cache.beton(source) == third
    with Reader(smaller) as reader:
        assert reader.widths.max() == 16


def test_a_cache_may_lie_in_a_folder_whose_name_is_no_text(folder: Path, tmp_path: Path) -> None:
    cache = Cache(tmp_path / os.fsdecode(b"caf\xe9") / "cache")
    with Reader(cache.beton(str(folder / "train"))) as reader:
        assert len(reader) == 8


@pytest.mark.parametrize("damage", ["cut", "no sidecar", "empty"])
def test_a_damaged_file_of_the_cache_is_written_again(folder: Path, tmp_path: Path, damage: str) -> None:
    cache, source = Cache(tmp_path / "cache"), str(folder / "train")
    path = Path(cache.beton(source))
    whole = path.read_bytes()
    if damage == "no sidecar":
        Path(f"{path}.json").unlink()
    else:
        path.write_bytes(whole[:5000] if damage == "cut" else b"")
    assert cache.beton(source) == str(path)
    assert path.read_bytes() == whole


def test_a_link_to_nothing_and_a_circle_of_links_are_taken_as_in_the_source(folder: Path, tmp_path: Path) -> None:
    (folder / "train" / "a" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    with Reader(Cache(tmp_path / "cache").beton(str(folder / "train"))) as reader:
        assert len(reader) == 8
    (folder / "train" / "a" / "again").symlink_to(folder / "train")
    with pytest.raises(ConfigError, match="cannot be used"):
        Cache(tmp_path / "cache").beton(str(folder / "train"))


def test_a_run_resumes_on_the_images_it_began_with_though_the_folder_has_changed(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = ["demo", f"--data={folder / 'train'}", f"--out={tmp_path / 'run'}", *TRAIN, "--checkpoint-every=0.01s"]
    process = Fork(tmp_path / "said", *asked, "--budget=1h")
    wait_until(lambda: checkpoint.exists(RunFolder(tmp_path / "run").checkpoints), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    began_with = RunFolder(tmp_path / "run").read_config().data
    (folder / "train" / "a" / "new.jpg").write_bytes(draw(99))
    assert main([*asked, "--budget=until 2001-01-01", "--resume"]) == 0
    assert RunFolder(tmp_path / "run").read_config().data == began_with
    assert main([*asked, "--epochs=1"]) == 2
    assert "already holds a run" in capfd.readouterr().err


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
    assert main(["demo", f"--data={folder}", f"--out={tmp_path / 'run'}", *TRAIN, "--epochs=1"]) == 2
    first, second = capfd.readouterr().err.splitlines()
    assert re.match(r"fastbyol-prep: error: .*train and val look like parts of one data set", first)
    assert re.match(r"fastbyol-train: error: .*photos cannot be used, as said above", second)
    given = ["--prep", "--labels=none"]
    assert main(["demo", f"--data={folder}", f"--out={tmp_path / 'run'}", *given, *TRAIN, "--epochs=1"]) == 0


def test_the_budget_holds_for_a_conversion_too(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="could not be converted within the budget; give a longer --budget"):
        Cache(tmp_path / "cache", end_s=time.monotonic() + 0.01).beton(str(folder / "train"))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.slow
def test_a_signal_while_images_are_converted_leaves_nothing_behind(tmp_path: Path) -> None:
    many = lay_out(tmp_path / "many", {"0.jpg": draw(0, side=3000)})
    for number in range(1, 300):
        (many / f"{number}.jpg").symlink_to(many / "0.jpg")
    process = Fork(
        tmp_path / "said", "demo", f"--data={many}", f"--out={tmp_path / 'runs' / 'run'}", *TRAIN, "--epochs=1"
    )
    wait_until(lambda: any((tmp_path / "runs" / "cache").glob(".*.partial")), process)
    wait_until(lambda: "is converted, once, to" in (tmp_path / "said").read_text(), process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 75, said
    assert "fastbyol-train: interrupted; continue with the same command" in said
    assert [path.suffix for path in (tmp_path / "runs" / "cache").iterdir()] == [".lock"]


@pytest.fixture
def web(folder: Path) -> Iterator[Web]:
    """Serve the images."""
    pytest.importorskip("fsspec", reason="sources elsewhere are read by fsspec: pip install '.[remote]'")
    pytest.importorskip("aiohttp", reason="fsspec reads the web by aiohttp: pip install '.[remote]'")
    with Web(folder).serving() as web:
        yield web


def test_an_address_is_fetched_once_and_trained_on(web: Web, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = [f"--data={web.address}/train", f"--val={web.address}/val"]
    for run in ("first", "second"):
        assert main(["demo", *files, f"--out={tmp_path / 'runs' / run}", *TRAIN, "--epochs=1"]) == 0
    assert capfd.readouterr().err.count("unchanged since it was written") == 2
    assert web.fetched() == {f"/{name}": 1 for name in names_of(web.folder)}
    web.status |= {"/train": 503, "/val": 503}
    assert main(["demo", *files, f"--out={tmp_path / 'runs' / 'third'}", *TRAIN, "--epochs=1"]) == 2
    assert re.search(r"train-\w+\.beton was converted from it before: to use that", capfd.readouterr().err)
    assert main(["demo", *files, f"--out={tmp_path / 'runs' / 'first'}", *TRAIN, "--epochs=1", "--resume"]) == 0


def test_a_run_resumes_on_the_images_of_an_address_with_a_password_and_a_signature(web: Web, tmp_path: Path) -> None:
    place = web.address.replace("//", "//me:secret@")
    asked = ["demo", f"--out={tmp_path / 'run'}", *TRAIN, "--epochs=1"]
    assert main([*asked, f"--data={place}/train?signature=secret"]) == 0
    data = RunFolder(tmp_path / "run").read_config().data
    assert not is_conversion_of(data, f"{place}/train/?signature=secret")
    assert not is_conversion_of(data, f"{place}/train?signature=another")
    assert not is_conversion_of(data, str(web.folder / "train"))
    web.asked.clear()
    assert main([*asked, f"--data={place}/train?signature=secret", "--resume"]) == 0
    assert not web.asked


def names_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")}


@pytest.mark.slow
def test_the_budget_ends_a_fetch_and_keeps_what_is_whole(
    web: Web, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    web.held.add("/train/a/0.jpg")
    address = f"{web.address.replace('//', '//me:secret@')}/train?signature=secret"
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"//me@[^?]*/train could not be converted within the budget"):
        Cache(tmp_path / "cache", end_s=began + 5).beton(address)
    assert time.monotonic() - began < 15  # though the server holds up a file
    assert re.search("note: .* were fetched and stay in ", said := capfd.readouterr().err)
    assert "is converted, once, to" in said
    assert "secret" not in said
    web.released.set()
    before = web.fetched()
    assert set(before) == {f"/train/{name}" for name in names_of(web.folder / "train")}
    Cache(tmp_path / "cache").beton(address)
    assert web.fetched() == {"/train/a/0.jpg": 1}
    web.status["/train"] = 403
    with pytest.raises(ConfigError, match=r"//me@[^?]*/train cannot be used"):
        Cache(tmp_path / "cache").beton(address)
