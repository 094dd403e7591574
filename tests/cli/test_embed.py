"""Laws of fastbyol-embed: from images to files, on from any kill, one clear line for every wrong input."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import sys
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fastbyol.beton import RAW, Reader, StoredImage
from fastbyol.cli.embed import main
from fastbyol.cli.embed_run import partial_path
from fastbyol.cli.train import main as train
from fastbyol.data_prep import demo
from fastbyol.data_prep.writer import Writer
from fastbyol.embed import page
from tests.conftest import Betons, write_beton
from tests.support.commands import start, wait_until
from tests.support.full_disk import files_end_at

EMBED = (sys.executable, "-c", "from fastbyol.cli.start import embed; embed()")
ON_CPU = ("--device=cpu", "--workers=1")


@pytest.fixture(scope="module")
def run(betons: Betons, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train one epoch."""
    out = tmp_path_factory.mktemp("embed") / "run"
    asked = [f"--data={betons.train}", f"--out={out}", "--batch-size=32", "--device=cpu", "--no-tensorboard"]
    assert train(["demo", *asked, "--epochs=1", "--warmup-epochs=0"]) == 0
    return out


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write images for some seconds of work."""
    return write_beton(tmp_path_factory.mktemp("many") / "many.beton", 6000, split="train")


def test_a_folder_of_photographs_becomes_vectors_with_file_names(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for number in range(5):
        path = tmp_path / "photos" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    out = tmp_path / "new" / "v.npz"
    assert main([str(run), str(tmp_path / "photos"), f"--out={out}", f"--cache={tmp_path}", *ON_CPU, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["images"], facts["left_out"], facts["resumed_at"]) == (5, 0, 0)
    with np.load(out) as arrays:
        assert arrays["names"].tolist() == [f"{number}.png" for number in range(5)]
        assert arrays["labels"].tolist() == [-1] * 5
    assert [path.name for path in out.parent.iterdir()] == ["v.npz"]


def test_an_exported_encoder_gives_the_vectors_of_its_run(run: Path, betons: Betons, tmp_path: Path) -> None:
    assert main([str(run), str(betons.val), f"--out={tmp_path / 'a.npy'}", *ON_CPU]) == 0
    exported = [str(run / "encoder.safetensors"), str(betons.val), f"--out={tmp_path / 'b.npy'}"]
    assert main([*exported, *ON_CPU, "--px=32"]) == 0
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    assert (tmp_path / "b.names.txt").read_text().split() == [str(number) for number in range(60)]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_same_command_goes_on_after_a_stop_or_a_kill_to_the_same_bits(
    run: Path, many: Path, tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "v.npy"
    asked = [str(run), str(many), f"--out={out}", *ON_CPU, "--threads=1"]
    process = start(*EMBED, *asked)
    kept = partial_path(out)
    wait_until(lambda: kept.exists() and os.path.getsize(kept) > 100_000, process)  # noqa: PTH202
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == (75 if number == signal.SIGINT else -number), said
    assert number == signal.SIGKILL or "the same command goes on where it stopped" in said
    assert "Traceback" not in said
    assert not out.exists()
    assert main([*asked, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert 0 < facts["resumed_at"] < 6000 or number == signal.SIGKILL  # what is done is noted every two seconds
    assert main([*asked[:2], f"--out={tmp_path / 'w.npy'}", *asked[3:]]) == 0
    assert out.read_bytes() == (tmp_path / "w.npy").read_bytes()


def test_a_full_disk_ends_in_one_line_and_keeps_what_is_done(
    run: Path, betons: Betons, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [str(run), str(betons.val), f"--out={tmp_path / 'v.csv'}", *ON_CPU]
    with files_end_at(40_000):  # room for the numbers, not for their digits
        assert main(asked) == 2
    said = capsys.readouterr().err
    assert "check the path, its permissions and the space left" in said
    assert [path.name for path in tmp_path.iterdir()] == [".v.csv.vectors"]
    assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["resumed_at"] == 60
    with files_end_at(20_000):
        assert main([*asked, "--overwrite"]) == 2


def test_what_lies_beside_a_stopped_file_does_not_stop_it_again(run: Path, betons: Betons, tmp_path: Path) -> None:
    asked = [str(run), str(betons.val), f"--out={tmp_path / 'v.csv'}", "--neighbours=2", *ON_CPU]
    with files_end_at(40_000):  # room for the neighbours, not for the vectors
        assert main(asked) == 2
    assert (tmp_path / "v.neighbours.csv").exists()
    assert main(asked) == 0


def test_tables_of_other_vectors_are_not_replaced(
    run: Path, betons: Betons, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, status in (("v.npz", 0), ("v.csv", 2)):
        assert main([str(run), str(betons.val), f"--out={tmp_path / name}", "--neighbours=2", *ON_CPU]) == status
    assert "v.neighbours.csv already exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "name"), [("--map={tmp}/map.html", "map.html"), ("--neighbours=2", "v.neighbours.csv")]
)
def test_what_another_command_left_behind_lets_no_file_be_replaced(
    more: str, name: str, run: Path, betons: Betons, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [str(run), str(betons.val), f"--out={tmp_path / 'v.csv'}", *ON_CPU]
    with files_end_at(40_000):
        assert main(asked) == 2
    assert partial_path(tmp_path / "v.csv").exists()
    (tmp_path / name).write_text("mine")
    assert main([*asked, more.format(tmp=tmp_path)]) == 2
    assert f"{name} already exists; give --overwrite or another --" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "mine"
    assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["resumed_at"] == 60


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--clusters=61", "--clusters is 61, but there are 60 images; give at most as many"),
        ("--map={tmp}/there.html/map.html", "there.html: File exists; check the path"),
    ],
)
def test_what_cannot_be_made_of_the_images_is_said_before_they_are_embedded(
    more: str, said: str, run: Path, betons: Betons, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there.html").write_text("")
    asked = [str(run), str(betons.val), f"--out={tmp_path / 'v.npz'}", *ON_CPU, more.format(tmp=tmp_path)]
    assert main(asked) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there.html"]


def test_a_layout_that_needs_more_images_is_refused_before_they_are_embedded(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = write_beton(tmp_path / "few.beton", 3, split="val")
    asked = [str(run), str(few), f"--out={tmp_path / 'v.npz'}", f"--map={tmp_path / 'map.html'}", *ON_CPU]
    assert main([*asked, "--layout=tsne"]) == 2
    assert "--layout tsne needs at least 4 images, not 3" in capsys.readouterr().err
    assert not partial_path(tmp_path / "v.npz").exists()


def test_class_names_that_are_no_utf_8_are_escaped(run: Path, tmp_path: Path) -> None:
    images, _ = demo.draw(2, seed=0, split="val")
    with Writer(tmp_path / "odd.beton", capacity=2, class_names=["a", os.fsdecode(b"caf\xe9")]) as writer:
        for number, image in enumerate(images):
            writer.append(StoredImage(RAW, 32, 32, image.tobytes()), label=number)
    assert main([str(run), str(tmp_path / "odd.beton"), f"--out={tmp_path / 'v.parquet'}", *ON_CPU]) == 0
    assert pq.read_table(tmp_path / "v.parquet")["class"].to_pylist() == ["a", "caf\\udce9"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("{run} {val} --out {tmp}/folder.npy", "is a folder; give the name of a file in it"),
        ("{run} {val} --out {tmp}/there.csv", "already exists; give --overwrite or another --out"),
        ("{run} {val} --out {tmp}/there.csv/v.npy", "there.csv: File exists; check the path"),
        ("{run} {val} --out {tmp}/v.npy", "v.names.txt already exists"),
        ("{run} {tmp}/none --out {tmp}/w.npy", "cannot be used, as said above"),
        ("{tmp} {val} --out {tmp}/w.npy", "holds no run"),
        ("{tmp}/there.csv {val} --out {tmp}/w.npy", "does not load as weights alone (EOFError)"),
        ("{run}/encoder.safetensors {val} --out {tmp}/w.npy", "give it, as in --px 224"),
        ("{unfinished} {val} --out {tmp}/w.npy", "has not finished; continue it with fastbyol-train --resume"),
    ],
)
def test_wrong_input_is_one_line(
    asked: str, said: str, run: Path, betons: Betons, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "there.csv").write_text("")
    (tmp_path / "v.names.txt").write_text("")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.json").write_bytes((run / "config.json").read_bytes())
    places = {"run": run, "val": betons.val, "tmp": tmp_path, "unfinished": tmp_path / "unfinished"}
    words = [word.format(**places) for word in asked.split()]
    assert main([*words, *ON_CPU]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told
    assert not (tmp_path / "w.npy").exists()


def test_images_that_do_not_decode_stop_or_are_left_out(
    run: Path, betons: Betons, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Reader(betons.val) as reader:
        begin, end = int(reader.offsets[5]), int(reader.offsets[5] + reader.sizes[5])
    data = betons.val.read_bytes()
    (tmp_path / "d.beton").write_bytes(data[:begin] + bytes(end - begin) + data[end:])
    asked = [str(run), str(tmp_path / "d.beton"), f"--out={tmp_path / 'v.npy'}", *ON_CPU]
    assert main(asked) == 2
    assert "sample 5" in capsys.readouterr().err
    assert main([*asked, "--on-error=skip"]) == 0
    assert "59 vectors of" in (said := capsys.readouterr().out)
    assert "1 left out" in said
    assert "5" not in (tmp_path / "v.names.txt").read_text().splitlines()


def test_neighbours_copies_and_groups_lie_beside_the_vectors(
    run: Path, betons: Betons, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [str(run), str(betons.val), "--neighbours=3", "--duplicates=0.9", "--clusters=4", *ON_CPU]
    assert main([*asked, f"--out={tmp_path / 'v.parquet'}", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["neighbours"] == str(tmp_path / "v.neighbours.parquet")
    assert facts["clusters"] == 4
    near = pq.read_table(tmp_path / "v.neighbours.parquet").to_pydict()
    assert near["rank"] == [1, 2, 3] * 60
    assert len(pq.read_table(tmp_path / "v.duplicates.parquet")) == facts["pairs"]
    assert set(pq.read_table(tmp_path / "v.parquet")["cluster"].to_pylist()) == {0, 1, 2, 3}
    assert main([*asked, f"--out={tmp_path / 'v.npy'}"]) == 0
    assert f"{facts['pairs']} pairs of near copies" in capsys.readouterr().out
    with (tmp_path / "v.neighbours.csv").open(newline="") as file:
        assert [row[2] for row in csv.reader(file)][1:] == near["neighbour"]
    assert np.load(tmp_path / "v.clusters.npy").shape == (60,)


def test_a_map_is_one_file_beside_the_vectors(
    run: Path, betons: Betons, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [str(run), str(betons.val), f"--map={tmp_path / 'new' / 'map.html'}", *ON_CPU]
    assert main([*asked, f"--out={tmp_path / 'v.npz'}", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["map"]
    assert (shown["points"], shown["thumbnails"]) == (60, 60)
    assert shown["bytes"] == (tmp_path / "new" / "map.html").stat().st_size
    report = (run / "report.html").read_text()
    (link,) = re.findall(r'<a href="([^"]+)">val.beton</a>, 60 images', report)
    assert (run / unquote(link)).resolve() == (tmp_path / "new" / "map.html").resolve()
    assert main([*asked, f"--out={tmp_path / 'w.npz'}"]) == 2
    assert "map.html already exists; give --overwrite or another --map" in capsys.readouterr().err
    monkeypatch.setattr(page, "POINTS_MAX", 25)
    assert main([*asked, f"--out={tmp_path / 'w.npz'}", "--overwrite", "--neighbours=2"]) == 0
    assert "map.html: 25 images, 25 of them as thumbnails" in capsys.readouterr().out
    assert "25 images · of 60 · principal components" in (tmp_path / "new" / "map.html").read_text()
    with np.load(tmp_path / "w.npz") as arrays:
        assert len(arrays["vectors"]) == 60


def test_a_map_that_fails_leaves_the_vectors_to_go_on_from(
    run: Path, betons: Betons, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [str(run), str(betons.val), f"--out={tmp_path / 'v.npz'}", f"--map={tmp_path / 'map.html'}", *ON_CPU]
    with files_end_at(50_000):
        assert main(asked) == 2
    assert "space left" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".v.npz.vectors"]
    assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["resumed_at"] == 60
