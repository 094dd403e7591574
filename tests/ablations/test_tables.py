"""Laws of the tables: cells that build, runs that are skipped, resumed or lost alone, and pages that hide nothing."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fastbyol.ablations.page import disagreements, markdown, plot, write
from fastbyol.ablations.paper import TABLES, Cell, Table
from fastbyol.ablations.runs import Job, RunCrashed, RunResult, read_result, train_run
from fastbyol.cli import table
from fastbyol.cli.eval import add_table_flags, main
from fastbyol.monitor.metrics import read_metrics
from fastbyol.recipes import named
from fastbyol.storage.run_folder import RunFolder
from fastbyol.storage.scores import load_scores
from tests.conftest import Betons
from tests.support.commands import PATIENCE_S

BASE = "demo+hidden=16+out=8"
TRAIN = ("--warmup-epochs=0", "--batch-size=32", "--device=cpu", "--log-every=1", "--workers=1")


def words(betons: Betons, *more: str, epochs: int = 1) -> tuple[str, ...]:
    return (
        "demo+hidden=16+out=8",
        f"--data={betons.train}",
        f"--val={betons.val}",
        f"--epochs={epochs}",
        *TRAIN,
        *more,
    )


def ignore(_: float) -> None:
    """Watch nothing."""


@pytest.mark.parametrize("base", ["imagenet_rn50_e300", "cifar10_tiny"])
@pytest.mark.parametrize("name", TABLES)
def test_every_cell_is_a_recipe_of_its_own(name: str, base: str) -> None:
    table = TABLES[name](named(base))
    recipes = [named(f"{base}+{cell.change}" if cell.change else base) for cell in table.cells]
    assert recipes
    assert len({cell.folder for cell in table.cells}) == len(recipes)
    assert all(0 <= cell.paper <= 100 for cell in table.cells if cell.paper is not None)


@pytest.mark.parametrize("name", TABLES)
def test_every_table_holds_the_papers_baseline_with_its_score(name: str) -> None:
    """A cell that leaves the paper's base as it is scores 72.5; where the paper has one, others with 72.5 differ."""
    base = named("imagenet_rn50_e300")
    for cell in TABLES[name](base).cells:
        recipe = named(f"{base.name}+{cell.change}") if cell.change else base
        if cell.paper is not None and (recipe.optim, recipe.head, recipe.views, recipe.objective) == (
            base.optim,
            base.head,
            base.views,
            base.objective,
        ):
            assert cell.paper == 72.5
            return
    pytest.fail(f"no cell of table {name} is the base recipe")


def test_smaller_batches_are_parts_of_the_bases() -> None:
    cells = TABLES["batch"](named("imagenet_rn50_e300")).cells
    assert [cell.flags for cell in cells] == [(), *((f"--micro-batches={2**k}",) for k in range(1, 7))]
    small = TABLES["batch"](named("cifar10_tiny+batch_size=8")).cells
    assert [cell.paper for cell in small] == [72.5, 72.4, 72.2]


def test_settings_that_follow_the_base_scale_with_it() -> None:
    cells = TABLES["learning_rate"](named("cifar10_tiny")).cells
    assert named(f"cifar10_tiny+{cells[3].change}").optim == named("cifar10_tiny").optim
    assert named(f"cifar10_tiny+{cells[0].change}").optim.base_lr == pytest.approx(0.1)


def job_of(path: Path, betons: Betons, *more: str, epochs: int = 1) -> Job:
    return Job(Cell("base", "", 72.5), 0, path / "baseline" / "seed0", words(betons, *more, epochs=epochs))


@pytest.fixture(scope="module")
def ended(betons: Betons, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Run one cell to its end."""
    job = job_of(tmp_path_factory.mktemp("table"), betons)
    assert read_result(job) is None
    train_run(job, on_progress=ignore)
    return job


def test_a_run_that_ended_has_scores_and_a_spread(ended: Job) -> None:
    found = read_result(ended)
    result = json.loads(ended.folder.result.read_text())
    last = read_metrics(ended.folder.metrics)[-1]
    assert found == RunResult(
        0,
        knn_top1=result["knn_top1"],
        knn_top1_random_init=result["knn_top1_random_init"],
        scaled_std=pytest.approx(8**0.5 * last["embedding_std"]),
    )


def test_another_run_in_a_cells_place_is_refused(ended: Job, betons: Betons) -> None:
    other = Job(ended.cell, 0, ended.path, words(betons, epochs=2))
    with pytest.raises(ValueError, match=r"--epochs=1.*--epochs=2.*another --out"):
        read_result(other)


def test_divergence_is_a_result(betons: Betons, tmp_path: Path) -> None:
    job = job_of(tmp_path, betons, "--base-lr=1e30", epochs=9)
    train_run(job, on_progress=ignore)
    result = read_result(job)
    assert result is not None
    assert (result.status, result.knn_top1) == (3, None)
    assert "base-lr" in result.last_line


def test_bad_input_is_told_in_the_runs_own_words(betons: Betons, tmp_path: Path) -> None:
    job = job_of(tmp_path, betons, "--batch-size=1000")
    with pytest.raises(ValueError, match=r"^batch size is 1000; .* has only 160 images"):
        train_run(job, on_progress=ignore)
    assert read_result(job) is None


def test_a_crash_loses_its_run_alone(betons: Betons, tmp_path: Path) -> None:
    job = job_of(tmp_path, betons, epochs=20_000)

    def kill(progress: float) -> None:
        if progress:
            children = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGKILL)

    with pytest.raises(RunCrashed, match=r"base, seed 0, ended with status -9"):
        train_run(job, on_progress=kill)
    assert read_result(job) is None
    assert job.folder.config.exists()


TWO = Table("Two cells", "table 0", [Cell("all", "", 72.5), Cell("wide", "hidden=32", 18.8, ("--prefetch=1",))])


def test_runs_are_listed_seed_by_seed_with_their_flags() -> None:
    parser = argparse.ArgumentParser()
    add_table_flags(parser)
    asked = ["target", "--base=demo", "--data=d", "--val=v", "--budget=3m", "--seeds=2", "--out=t"]
    jobs = table.list_jobs(parser.parse_args([*asked, "--with", "--workers", "8"]), TWO)
    common = ("--data=d", "--val=v", "--budget=3m")
    assert [(job.path, job.arguments) for job in jobs[1:3]] == [
        (
            Path("t/hidden=32 --prefetch=1/seed0"),
            ("demo+hidden=32", *common, "--seed=0", "--prefetch=1", "--workers", "8"),
        ),
        (Path("t/baseline/seed1"), ("demo", *common, "--seed=1", "--workers", "8")),
    ]


def test_a_part_of_a_table_is_run_alone(betons: Betons, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_table_flags(parser)
    asked = ["target", "--base=demo", "--data=d", "--val=v", "--seeds=2", "--out=t", "--cells", "2"]
    args = parser.parse_args(asked)
    assert {job.cell for job in table.select_jobs(table.list_jobs(args, TWO), args, TWO)} == {TWO.cells[1]}
    files = [f"--data={betons.train}", f"--val={betons.val}"]
    assert main(["table", "target", f"--base={BASE}", *files, "--cells", "1", "7"]) == 2
    assert "the table has 6 cells" in capsys.readouterr().err


@pytest.mark.slow
def test_a_table_runs_what_has_not_ended(
    betons: Betons, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TABLES, "target", lambda _: TWO)
    out = tmp_path / "table"
    asked = ["table", "target", f"--base={BASE}", f"--data={betons.train}", f"--val={betons.val}", "--epochs=1"]
    asked += ["--seeds=1", f"--out={out}", "--with", *TRAIN]
    assert main(asked) == 0
    page = (out / "table.md").read_text()
    assert "| all | none | 72.5 |" in page
    assert "linear, %" not in page
    assert main([*asked[:8], "--linear", *asked[8:]]) == 0
    (found,) = load_scores(RunFolder(out / "baseline" / "seed0"))
    scored = (out / "table.md").read_text()
    assert "| cell | change | paper, % | kNN, % | linear, % |" in scored
    assert f"| {found['trained']['top1']:.1f} |" in scored.split("| all |")[1].split("\n")[0]
    assert "| wide | `hidden=32 --prefetch=1` | 18.8 |" in page
    assert (out / "table.png").stat().st_size > 1000
    first, second = out / "baseline" / "seed0.json", out / "hidden=32 --prefetch=1" / "seed0.json"
    written = first.stat().st_mtime_ns
    second.unlink()
    assert main(asked) == 0
    assert first.stat().st_mtime_ns == written
    assert second.is_file()
    capsys.readouterr()
    assert main([*asked, "--on-error=skip"]) == 2
    assert "another --out" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_table_is_continued_by_the_same_command(betons: Betons, tmp_path: Path) -> None:
    out = tmp_path / "table"
    asked = ["table", "normalization", f"--base={BASE}", f"--data={betons.train}", f"--val={betons.val}"]
    asked += ["--epochs=16", "--seeds=1", f"--out={out}", "--with", *TRAIN]
    table = [sys.executable, "-c", "import sys; from fastbyol.cli.start import evaluate; sys.exit(evaluate())"]
    process = subprocess.Popen([*table, *asked], stderr=subprocess.PIPE, text=True)
    folder = RunFolder(out / "normalization=l2" / "seed0")
    deadline = time.monotonic() + 120
    while len(read_metrics(folder.metrics)) < 4:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 75, said
    assert "continue with the same command" in said
    assert not folder.result.exists()
    steps = read_metrics(folder.metrics)[-1]["step"]
    assert sorted(folder.checkpoints.iterdir())[-1].name == f"step-{steps:09d}.pt"
    first = Job(Cell("l2", "normalization=l2"), 0, folder.path, _words_of(asked, "normalization=l2"))
    train_run(first, on_progress=ignore)
    assert steps < read_metrics(folder.metrics)[-1]["step"] == 80
    assert read_result(first) is not None


def _words_of(asked: list[str], change: str) -> tuple[str, ...]:
    return (f"{BASE}+{change}", *asked[3:6], "--seed=0", *TRAIN)


CELLS = [Cell("a", "", 72.5), Cell("b", "beta=1", 60.0), Cell("c", "beta=2", 59.0), Cell("d", "beta=3")]
TABLE = Table("Letters", "table 0", CELLS)


def runs(*scores: float | None, scaled_std: float = 0.9) -> list[RunResult]:
    return [
        RunResult(0 if score else 3, knn_top1=score, knn_top1_random_init=20.0, scaled_std=scaled_std)
        for score in scores
    ]


def test_order_is_compared_where_the_papers_gap_is_large() -> None:
    a, b, c, d = CELLS
    agreeing = {a: runs(40.0), b: runs(30.0), c: runs(31.0), d: runs(99.0)}
    assert disagreements(agreeing) == (2, [])
    assert disagreements({**agreeing, c: runs(41.0, 43.0)}) == (2, [(a, c)])
    assert disagreements({a: runs(40.0), b: [], c: runs(None)}) == (0, [])


def test_a_page_shows_means_spreads_divergence_and_disagreement() -> None:
    a, b, c, _ = CELLS
    results = {a: runs(40.0, 42.0), b: runs(45.0, None, scaled_std=0.0), c: []}
    text = markdown(TABLE, results, settings="Recipe demo", command="fastbyol-eval table letters")
    assert "| a | none | 72.5 | 41.0 ± 1.0 | 0.90 | 2 |" in text
    assert "| b | `beta=1` | 60 | 45.0 | 0.00 | 2, 1 diverged or collapsed |" in text
    assert "| c | `beta=2` | 59 | - | - | 0 |" in text
    assert "- Reversed: **a** over b." in text
    assert "Random init: kNN 20.0 %." in text


def test_a_plot_costs_only_who_draws_one() -> None:
    probe = "import sys, fastbyol.cli.eval_run; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0


def test_a_page_of_nothing_is_still_a_page(tmp_path: Path) -> None:
    path = write(tmp_path, TABLE, {}, settings="Recipe demo", command="fastbyol-eval table letters")
    assert path.read_text().count("| - | - | 0 |") == 4
    assert plot(TABLE, {}).axes[1].get_title().startswith("here: kNN")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (["--base=imagenet"], "imagenet_rn50"),
        (["--base=demo+lagged_target=true"], "lagged"),
        (["--data=none.beton"], "none.beton"),
        (["--budget=8 bananas"], "8 bananas"),
    ],
)
def test_bad_input_ends_with_one_clear_line_and_status_2(
    change: list[str], expected: str, betons: Betons, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [f"--data={betons.train}", f"--val={betons.val}", "--base=demo", f"--out={tmp_path / 'table'}"]
    assert main(["table", "target", *files, *change]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fastbyol-eval: error: ")
    assert said.count("\n") == 1
    assert expected in said
    assert not (tmp_path / "table").exists()
