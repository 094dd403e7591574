"""Laws of the benchmarks: nothing is timed unchecked, nothing that fails is silent, every group runs on a CPU."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks import bench, harness, report, roofline, rows, stopwatch
from benchmarks.cases import batchnorm, compare, loader, plain
from benchmarks.gpu import predictions
from benchmarks.harness import Absent, Case, Limits, Ready, measure
from fastbyol import optim
from fastbyol.config import EncoderConfig, HeadConfig, OptimConfig
from fastbyol.model.batchnorm import BatchNormAct1d, BatchNormAct2d, BatchNormAddReLU2d
from fastbyol.model.byol import BYOL
from fastbyol.model.resnet import NormedMaxPool, StemConv2d
from fastbyol.train import step
from tests.support.tolerances import NAIVE_STEPS_RTOL

ROOT = Path(__file__).parents[2]
PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}


def case(implementation: str, run: Callable[[], object], *, check: Callable[[], object] | None = None) -> Case:
    return Case("sleep", "short", implementation, lambda: Ready(run, check), images=10, bytes_moved=1000)


def fail() -> None:
    raise ValueError("out of luck\nand of lines")


def nothing() -> None: ...


def rows_of(cases: list[Case], **limits: float) -> dict[str, rows.Row]:
    found = measure(cases, device="cpu", limits=Limits(**{"repeats": 5, **limits}))  # type: ignore[arg-type]
    return {row["implementation"]: row for comparison in found for row in comparison}


def test_quantiles_and_rates_are_those_of_the_times() -> None:
    times = {"taken_ms": [1, 2, 3, 4, 5, 6], "cpu_ms": [5, 7, 9]}
    row = rows.row_of({"case": "c"}, **times, images=7, bytes_moved=7_000_000, copy_gb_per_s=4.0)
    assert (row["p20_ms"], row["p50_ms"], row["p80_ms"]) == (2.0, 3.5, 5.0)
    assert (row["images_per_s"], row["gb_per_s"], row["fraction_of_copy"]) == (2000.0, 2.0, 0.5)
    assert row["cpu_ms_per_image"] == 1.0
    assert row["repeats"] == 6
    assert row["error"] is None


def test_cpu_time_is_that_of_all_threads_and_of_children() -> None:
    burn = "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    thread = threading.Thread(target=exec, args=(burn.replace("process_time", "thread_time"),))
    since = stopwatch.CpuClock()
    thread.start()
    thread.join()
    assert since.elapsed_s() >= 0.3
    with subprocess.Popen([sys.executable, "-c", f"{burn}\nprint(flush=True); input()"], **PIPES) as child:
        child.stdout.readline()
        assert since.elapsed_s() >= 0.59  # of a running child in ticks of 10 ms
        child.communicate("\n")
    assert since.elapsed_s() >= 0.6


def test_rivals_are_timed_in_turn() -> None:
    order: list[str] = []
    found = rows_of([case(name, lambda name=name: order.append(name)) for name in "ab"])  # type: ignore[misc]
    assert order == ["a", "b"] * (5 + harness.WARM_UPS["cpu"])
    assert [row["repeats"] for row in found.values()] == [5, 5]


def test_a_case_alone_is_dropped_before_the_next_is_prepared() -> None:
    order: list[str] = []

    def prepared(name: str) -> Ready:
        order.append(f"prepare {name}")
        return Ready(lambda: order.append(name))

    cases = [Case("c", "s", name, lambda name=name: prepared(name), is_alone=True) for name in "ab"]  # type: ignore[misc]
    rows_of(cases, repeats=1)
    assert order == ["prepare a", "a", "a", "prepare b", "b", "b"]


@pytest.mark.parametrize("where", ["prepare", "check", "run"])
def test_a_failing_case_becomes_a_row_and_the_others_still_run(where: str) -> None:
    broken = {
        "prepare": Case("sleep", "short", "broken", fail),  # type: ignore[arg-type]
        "check": case("broken", nothing, check=fail),
        "run": case("broken", fail),
    }[where]
    found = rows_of([case("first", nothing), broken, case("last", nothing)])
    assert found["broken"]["error"] == "failed: ValueError: out of luck"
    assert "in fail\n" in found["broken"]["traceback"]
    assert found["broken"]["traceback"].endswith("ValueError: out of luck\nand of lines\n")
    assert found["broken"]["p50_ms"] is None
    assert rows.has_failed(found["broken"])
    assert found["first"]["repeats"] == found["last"]["repeats"] == 5


def test_a_case_that_fails_late_keeps_no_time() -> None:
    countdown = iter(range(3))
    found = rows_of([case("late", lambda: next(countdown))])
    assert found["late"]["error"].startswith("failed: StopIteration")
    assert found["late"]["p50_ms"] is None


def test_what_is_not_installed_is_absent_and_no_failure() -> None:
    def prepare() -> Ready:
        raise Absent("no such package")

    row = rows_of([Case("c", "s", "rival", prepare)])["rival"]
    assert row["error"] == "absent: no such package"
    assert not rows.has_failed(row)


def test_a_preparation_that_takes_too_long_is_stopped() -> None:
    began = time.monotonic()
    row = rows_of([Case("c", "s", "slow", lambda: time.sleep(60))], prepare_s=0.2)["slow"]  # type: ignore[arg-type]
    assert time.monotonic() - began < 10
    assert "TimeoutError" in row["error"]


def test_what_the_time_limit_cuts_off_says_so() -> None:
    found = rows_of([case("never", fail)], deadline=time.monotonic() - 1)
    assert found["never"]["error"] == "not run: the time limit had passed"
    assert rows.has_failed(found["never"])


def test_rounds_end_when_their_seconds_are_over() -> None:
    found = rows_of([case("slow", lambda: time.sleep(0.05))], repeats=1000, seconds=0.0)
    assert found["slow"]["repeats"] == harness.LEAST_ROUNDS


def test_measuring_can_start_in_the_middle() -> None:
    cases = [Case("c", shape, "a", lambda: Ready(nothing)) for shape in ("one", "two", "three")]
    found = measure(cases, device="cpu", limits=Limits(repeats=1), start=2)
    assert [row["shape"] for comparison in found for row in comparison] == ["three"]


def test_a_wrong_or_nan_result_is_refused() -> None:
    wanted = [torch.ones(4)]
    compare.agree([torch.ones(4)], wanted, tolerance=1e-6)
    for wrong in (torch.ones(4) * 1.1, torch.full((4,), torch.nan), torch.ones(5)):
        with pytest.raises(compare.WrongResult):
            compare.agree([wrong], wanted, tolerance=1e-2)


def all_gpu_cases() -> Iterator[Case]:
    """List the cases for a GPU; nothing is prepared."""
    for group in ("kernels", "views", "optimizer", "step", "candidates"):
        yield from bench.cases_of(bench.parser().parse_args([group]), "cuda")


def test_cases_of_a_gpu_are_told_apart_and_neighbours_compete() -> None:
    cases = list(all_gpu_cases())
    names = [(c.case, c.shape, c.dtype, c.implementation) for c in cases]
    assert len(set(names)) == len(names)
    questions = [c.question for c in cases]
    assert sum(a != b for a, b in pairwise(questions)) + 1 == len(set(questions))
    assert all(c.bytes_moved is None or c.bytes_moved > 0 for c in cases)


@pytest.mark.parametrize("group", bench.COMPILING_GROUPS)
def test_what_is_compiled_comes_last(group: str) -> None:
    cases = list(bench.cases_of(bench.parser().parse_args([group]), "cuda"))
    is_compiled = [case.is_compiled for case in cases]
    assert is_compiled == sorted(is_compiled)
    assert any(is_compiled)
    assert not any(bench.is_chosen(case, only="", without=["compile"]) for case in cases if case.is_compiled)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_loaders_compete_on_the_same_images(device: str) -> None:
    cases = list(loader.cases(None, name="drawn", device=device, batch_size=4, workers=2))
    assert len({(c.shape, c.implementation) for c in cases}) == len(cases)
    steps = [c for c in cases if c.case == "waiting"]
    assert bool(steps) == (device == "cuda")
    cases = [c for c in cases if c.case == "loader"]
    assert sum(a.question != b.question for a, b in pairwise(cases)) + 1 == 3 * 2
    assert all(c.images is not None and c.images % 4 == 0 for c in cases)
    assert report.HOST_BASELINE in {c.implementation for c in cases}


def test_a_rival_without_two_views_of_every_image_is_refused() -> None:
    job = loader.Job(loader.Photographs(None, None), "500 px", 1, 2, 1, "cpu")
    views_ = torch.randint(0, 256, (2, 2, 224, 224, 3), dtype=torch.uint8)
    cases = {
        "0 of 2 images came": [],
        "same": [(views_[0], views_[0])],
        "shapes": [(views_[0, :, 1:], views_[1, :, 1:])],
    }
    for fault, batches in cases.items():
        with pytest.raises(compare.WrongResult, match=fault):
            loader._theirs(lambda _, batches=batches: lambda: batches, job).run()
    loader._theirs(lambda _: lambda: [tuple(views_)], job).run()


def test_batch_norm_on_a_gpu_moves_the_bytes_its_kernels_name() -> None:
    problem = batchnorm.Problem(256, 56, True, 2, "cuda")
    elements = 2 * 256 * 256 * 56 * 56
    assert problem.bytes_moved(backward=False) == 8 * elements
    assert problem.bytes_moved(backward=True) == (8 + 14 + 1 / 4) * elements


@pytest.mark.parametrize(
    ("step_", "stem"),
    [(plain.lars_loop_, "cifar"), (plain.lars_foreach_, "imagenet")],
    ids=["loop", "foreach, imagenet stem"],
)
def test_plain_rival_takes_the_same_steps_without_our_kernels(step_: Callable[..., None], stem: str) -> None:
    config = OptimConfig(base_lr=0.8, weight_decay=1e-3, tau_base=0.9, warmup_epochs=0)
    model = BYOL(EncoderConfig("resnet8", width=1 / 16, stem=stem), HeadConfig(hidden=16, out=8), seed=1).double()
    other = copy.deepcopy(model)
    ours = step.Eager(model, optim.build(model, model.target_of(), config))
    theirs = step.Eager(other, plain.LARS(other, config, step_))  # type: ignore[arg-type]
    theirs.forward = plain.PerView(other)
    ours_in_theirs = StemConv2d | NormedMaxPool | BatchNormAct1d | BatchNormAct2d | BatchNormAddReLU2d
    assert not any(isinstance(module, ours_in_theirs) for module in other.modules())
    for number in range(3):
        images = torch.randn(12, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
        found = [engine(images, lr=0.1, tau=0.9).loss.item() for engine in (ours, theirs)]
        assert found[0] == pytest.approx(found[1], rel=NAIVE_STEPS_RTOL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("groups", "cases", "only"),
    [
        ("kernels views optimizer step candidates", {"batch norm", "views", "LARS + EMA", "step", "candidate"}, ""),
        ("loader prep", {"loader", "prep"}, "500 px, 2|passthrough"),
        ("evaluate", {"linear"}, "1 epoch"),
        ("embed", {"embed"}, "fastbyol"),
    ],
)
def test_every_group_runs_its_reduced_form(groups: str, cases: set[str], only: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    command = [sys.executable, "benchmarks/bench.py", *groups.split(), "--device", "cpu", "--repeats", "1"]
    command += [word for text in only.split("|") for word in ("--only", text)]
    command += ["--json", str(file), "--batch-size", "5", "--images", "40"]  # of the loaders, of embed
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("reduced CPU form" in done.stdout) == (not set(groups.split()) <= set(bench.HOST_GROUPS))
    found = rows.read(file)
    timed = {row["case"] for row in found if row["p50_ms"]}
    assert all(any(case in name for name in timed) for case in cases), timed
    assert not any(map(rows.has_failed, found))
    assert {"gpu", "triton", "cuda", "commit"} <= found[0].keys()


def test_the_interpreter_is_not_timed() -> None:
    command = [sys.executable, "benchmarks/bench.py", "kernels", "--device", "cpu"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr


def row(implementation: str, p50_ms: float | None, *, gpu: str | None = None, **others: object) -> rows.Row:
    named = {"case": "c", "shape": "s", "dtype": "float32", "implementation": implementation}
    made = rows.row_of(named, taken_ms=[] if p50_ms is None else [p50_ms])
    place = {"gpu": gpu, "hardware": "cpu", "threads": 2, "torch": "2", "python": "3", "commit": "abc"}
    return made | place | others


def test_report_keeps_the_newest_row_and_compares_on_one_machine() -> None:
    found = [
        row("fastbyol", 9.0, gpu="G"),
        row("fastbyol", 2.0, gpu="G"),
        row("eager", 3.0, gpu="G"),
        row("eager", 1.0),
    ]
    text = report.markdown(found, on_gpu=True)
    assert "| c | s | 2.0 | eager | 3.0 | 1.50 |" in text
    assert "9.0" not in text
    assert "### G; torch 2, python 3" in text


def test_report_keeps_losing_and_failing_rows() -> None:
    found = [row("fastbyol", 4.0, gpu="G"), row("eager", 1.0, gpu="G"), row("x", None, gpu="G", error="failed: why")]
    text = report.markdown(found, on_gpu=True)
    assert "| 0.25 |" in text
    assert "failed: why" in text


def test_report_relates_host_costs_to_natives_and_names_no_winner() -> None:
    def cost(implementation: str, cpu_ms: float) -> rows.Row:
        shape = "photographs, 500 px, 2 threads"
        facts = {"case": "loader", "shape": shape, "cpu_ms_per_image": cpu_ms, "images_per_s": 500.0}
        return row(implementation, 8 * cpu_ms, **facts)

    text = report.markdown([cost(report.HOST_BASELINE, 2.0), cost("ffcv", 5.0)], on_gpu=False)
    assert f"| {report.HOST_BASELINE} | 2.00 (1.00), 500 |" in text
    assert "| ffcv | 5.00 (2.50), 500 |" in text
    assert "best rival" not in text


def test_report_says_where_nothing_was_measured() -> None:
    assert report.markdown([row("eager", 1.0)], on_gpu=True) == "No GPU has run these benchmarks yet."


def test_the_document_holds_the_newest_rows_and_predictions() -> None:
    kept = [each for file in sorted((ROOT / "benchmarks" / "results").glob("*.jsonl")) for each in rows.read(file)]
    text = report.DOCUMENT.read_text()
    for on_gpu, (begin, end) in report.MARKERS.items():
        assert text.split(begin)[1].split(end)[0].strip() == report.markdown(kept, on_gpu=on_gpu)
    assert text.split(roofline.BEGIN)[1].split(roofline.END)[0].strip() == roofline.markdown()


def test_roofline_of_a_resnet50_is_that_of_its_layers() -> None:
    network = roofline.trace("resnet50", "imagenet", 224)
    assert len(network.units) == 53
    assert sum(unit.has_residual for unit in network.units) == len(network.block_inputs) == 16
    assert sum(not unit.has_relu for unit in network.units) == 4
    assert sum(unit.flops for unit in network.units) / 2e9 == pytest.approx(4.087, abs=5e-4)  # the known multiply-adds
    h100, h200 = roofline.CARDS
    eager, fused = (roofline.predict(network, passes, h200) for passes in (roofline.eager, roofline.fused))
    bounds = {card.name: roofline.predict(network, roofline.fused, card).images_per_s for card in (h100, h200)}
    assert {name: round(bound) for name, bound in bounds.items()} == predictions.EXPECTED[0].bound
    assert eager.gflop == fused.gflop == pytest.approx(64.9, abs=0.1)
    assert eager.mb == pytest.approx(1322, rel=0.005)
    assert fused.mb < 0.75 * eager.mb
