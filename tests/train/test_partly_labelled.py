"""Laws of images of which some or none have a label: all are trained on, and those with a label are scored."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from fastbyol.beton import UNLABELLED, Reader
from fastbyol.cli import eval as evaluation
from fastbyol.cli.train import main
from fastbyol.data_prep import cli as prep
from fastbyol.monitor.metrics import read_metrics
from fastbyol.storage.run_folder import RunFolder
from tests.conftest import Betons
from tests.support.layouts import draw, lay_out

SHORT = ("--epochs=1", "--warmup-epochs=0", "--batch-size=8", "--log-every=1", "--device=cpu", "--no-tensorboard")
FILES = {f"{number:02}.png": draw(number, kind="PNG") for number in range(16)}
LABELS = [number % 3 if number % 2 else None for number in range(16)]  # of every second image


@pytest.fixture
def partly(tmp_path: Path) -> Path:
    """Write sixteen images, eight of which have one of three labels."""
    lines = [f"{name} {'' if label is None else label}" for name, label in zip(FILES, LABELS, strict=True)]
    lay_out(tmp_path / "in", FILES | {"list.txt": "\n".join(lines).encode()})
    assert prep.main(["write", str(tmp_path / "in/list.txt"), str(tmp_path / "partly.beton")]) == 0
    return tmp_path / "partly.beton"


def test_what_has_no_label_is_counted_and_kept(partly: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prep.main(["write", str(partly.parent / "in/list.txt"), str(partly), "--overwrite"]) == 0
    assert "8 of 16 images have no label" in capsys.readouterr().out
    with Reader(partly) as reader:
        assert reader.labels is not None
        assert reader.labels.tolist() == [UNLABELLED if label is None else label for label in LABELS]
        assert reader.class_names == ["0", "1", "2"]
        assert reader.describe(0) == "sample 0 (00.png)"
    assert prep.main(["info", str(partly)]) == 0
    assert "without label   8" in capsys.readouterr().out


def test_the_count_is_of_what_is_written(partly: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(partly.parent / "in/list.txt")
    assert prep.main(["write", source, str(partly), "--overwrite", "--limit", "5"]) == 0
    with Reader(partly) as reader:
        assert reader.labels is not None
        unlabelled = int((reader.labels == UNLABELLED).sum())
    assert f"{unlabelled} of 5 images have no label" in capsys.readouterr().out


def test_the_labelled_part_reads_the_same_samples(partly: Path) -> None:
    with Reader(partly) as reader:
        part = reader.labelled()
        assert len(part) == 8
        for index, number in enumerate(range(1, 16, 2)):
            assert part.payload(index) == reader.payload(number)
            assert part.describe(index) == reader.describe(number)
        for name in ("widths", "heights", "offsets", "sizes", "modes", "labels"):
            assert np.array_equal(getattr(part, name), getattr(reader, name)[1::2])
        assert part.labelled() is part
        part.close()
        assert len(reader.payload(0)) > 0


def test_a_run_trains_on_all_and_scores_the_labelled_part(partly: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(["demo", f"--data={partly}", f"--val={partly}", f"--out={out}", *SHORT]) == 0
    result = json.loads(RunFolder(out).result.read_text())
    assert result["images"] == 16
    assert 0 <= result["knn_top1"] <= 100
    assert all(0 <= row["probe_top1"] <= 100 for row in read_metrics(RunFolder(out).metrics))
    assert re.search(r'title="[012]: query, \d\d\.png"', RunFolder(out).report.read_text())


def test_evaluations_leave_the_others_out_and_say_so(
    partly: Path, finished: Path, betons: Betons, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluation.main(["knn", str(finished), f"--train={partly}", f"--val={partly}", "--k=3", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["trained"]["bank"] == 8
    assert f"{partly}: 8 of 16 images have a label; the others are left out" in said.err
    assert evaluation.main(["knn", str(finished), f"--train={betons.unlabelled}", f"--val={partly}"]) == 2
    assert "has no labels" in capsys.readouterr().err


def test_the_bank_of_unlabelled_images_may_be_another_file(betons: Betons, tmp_path: Path) -> None:
    given = ["demo", f"--data={betons.unlabelled}", f"--val={betons.val}", f"--out={tmp_path / 'run'}", *SHORT]
    assert main(given) == 2
    assert main([*given, f"--labelled={betons.train}"]) == 0
    result = json.loads(RunFolder(tmp_path / "run").result.read_text())
    assert 0 <= result["knn_top1"] <= 100
    assert result["images"] == 40


def test_labels_cannot_be_dropped_and_scored(betons: Betons, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lay_out(tmp_path / "dates/2024", FILES)
    given = ["demo", f"--data={tmp_path / 'dates'}", f"--out={tmp_path / 'run'}", "--prep=--labels none", *SHORT]
    assert main([*given, f"--val={betons.val}", f"--labelled={tmp_path / 'dates'}"]) == 2
    assert "would take the labels of --val and --labelled, too" in capfd.readouterr().err
    assert not (tmp_path / "cache").exists()
    assert main([*given, f"--val={betons.val}"]) == 2
    assert "give fastbyol-train other images with --labelled" in capfd.readouterr().err
    assert main([*given, f"--val={betons.val}", f"--labelled={betons.train}"]) == 0


def test_a_bank_without_images_to_score_is_refused(betons: Betons, tmp_path: Path) -> None:
    given = ["demo", f"--data={betons.unlabelled}", f"--labelled={betons.train}", f"--out={tmp_path / 'run'}", *SHORT]
    assert main(given) == 2
