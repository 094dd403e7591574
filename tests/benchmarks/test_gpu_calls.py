"""Laws of the calls on a borrowed GPU: no part hides another, what happens is kept and fits, ends are in time."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

from benchmarks import bench
from benchmarks.gpu import calls, carry, commands, images, predictions, resume, summary, tools
from benchmarks.gpu import output as output_module
from benchmarks.gpu import parts as parts_module
from benchmarks.gpu.output import FILE_BYTES, FILES_MAX, PART_HEAD_BYTES, PART_TAIL_BYTES, Output
from benchmarks.gpu.parts import SKIPPED, Outcome, Part, run
from fastbyol.cli import train
from fastbyol.cli.train_run import config_of
from fastbyol.storage.run_folder import RunFolder
from fastbyol.system.usage import usage

ROOT = Path(__file__).parents[2]
FAREWELL_S = 1.5  # instead of the six seconds that a real part gets


@pytest.fixture(autouse=True)
def _short_farewell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "FAREWELL_S", FAREWELL_S)


CALL = (sys.executable, "benchmarks/gpu/call.py")
FACTS = {"gpu": "NVIDIA H100 80GB HBM3", "torch": "2.11.0"}


def part(name: str, code: str, limit_s: float = 30.0) -> Part:
    return Part(name, (sys.executable, "-c", code), limit_s)


def carried_out(stage: list[Part], folder: Path, *, seconds: float = 60.0, stop: bool = False) -> list[Outcome]:
    output, stopped = Output(folder), threading.Event()
    if stop:
        stopped.set()
    given = {"root": ROOT, "environment": dict(os.environ), "say": output.say, "stopped": stopped}
    outcomes = run(stage, deadline=time.monotonic() + seconds, **given)  # type: ignore[arg-type]
    for outcome in outcomes:
        output.end(outcome.name)
    return outcomes


def where(tmp_path: Path, device: str = "cuda", **more: object) -> calls.Where:
    paths = [tmp_path / name for name in ("work", "rows.jsonl", "failed.txt", "facts.json", "carried")]
    return calls.Where(device, *paths, "abc", **more)  # type: ignore[arg-type]


@pytest.mark.slow
def test_parts_that_fail_hang_or_cannot_start_hide_none(tmp_path: Path) -> None:
    stage = [
        part("fails", "raise ValueError('out of\\nluck')"),
        part("hangs", "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(60)", 1.0),
        part("crashes", "import os; os.kill(os.getpid(), 9)"),
        part("skips", f"print('no tool'); raise SystemExit({SKIPPED})"),
        Part("is missing", ("/no/such/program",), 5.0),
        part("works", "print('done')"),
    ]
    outcomes = {outcome.name: outcome for outcome in carried_out(stage, tmp_path)}
    log = (tmp_path / "log.txt").read_text()
    assert outcomes["fails"].status == "failed: exit status 1"
    for line in ("fails | Traceback (most recent call last):", "fails | ValueError: out of", "fails | luck"):
        assert line in log
    assert outcomes["hangs"].status == "failed: stopped after 1 s"
    assert outcomes["crashes"].status == "failed: killed by SIGKILL"
    assert outcomes["skips"].status == "skipped: no tool"
    assert "No such file" in outcomes["is missing"].status
    assert outcomes["works"].is_ok


def test_a_part_takes_what_it_started_with_it(tmp_path: Path) -> None:
    child = [sys.executable, "-c", "import time; time.sleep(60)"]
    code = f"import subprocess; print(subprocess.Popen({child!r}).pid)"
    (outcome,) = carried_out([part("parent", code)], tmp_path)
    pid = int(outcome.last_lines[0])
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_without_time_or_after_a_signal_nothing_starts(tmp_path: Path) -> None:
    late = carried_out([part("late", "pass")], tmp_path, seconds=FAREWELL_S - 1)
    assert [outcome.status for outcome in late] == ["not run: no time was left"]
    stopped = carried_out([part("stopped", "pass")], tmp_path, stop=True)
    assert [outcome.status for outcome in stopped] == ["not run: a signal came"]


def test_the_deadline_leaves_a_part_time_for_its_farewell(tmp_path: Path) -> None:
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('farewell')"
    began = time.monotonic()
    (outcome,) = carried_out([part("long", code)], tmp_path, seconds=FAREWELL_S + 1)
    assert outcome.last_lines[-1] == "farewell"
    assert time.monotonic() - began < FAREWELL_S + 1


def test_parts_beside_one_another_are_stopped_at_once(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(60)"
    began = time.monotonic()
    outcomes = carried_out([part("a", deaf), part("b", deaf)], tmp_path, seconds=FAREWELL_S + 1)
    assert time.monotonic() - began < FAREWELL_S + 2
    assert all(outcome.status == "failed: stopped after 1 s" for outcome in outcomes)


def test_a_set_may_be_drawn_anew_as_another(tmp_path: Path) -> None:
    images.set_of("cifar10", tmp_path).train.with_suffix(".beton.json").write_text("{}")  # of the set before
    images.draw("cifar10", tmp_path)
    images.prep("verify", images.set_of("cifar10", tmp_path).train)


def test_a_flood_keeps_its_first_and_last_lines_and_others_theirs(tmp_path: Path) -> None:
    output = Output(tmp_path)
    for number in range(20_000):
        output.say("flood", f"{number:8} {'x' * 100}")
    output.say("quiet", "a line")
    output.end("flood")
    log = (tmp_path / "log.txt").read_text()
    assert len(log) < PART_HEAD_BYTES + PART_TAIL_BYTES + 1000
    assert "flood |        0 x" in log
    assert "lines are left out here" in log
    assert "flood |    19999 x" in log
    assert "quiet | a line" in log


def test_the_log_of_the_longest_call_fits_a_file(tmp_path: Path) -> None:
    for number in calls.DEADLINES_S:
        parts = [part for stage in calls.stages(number, where(tmp_path)) for part in stage]
        assert (len(parts) + 1) * (PART_HEAD_BYTES + PART_TAIL_BYTES + 1000) < FILE_BYTES


def test_packed_runs_hold_what_is_small_and_name_what_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_module, "FILE_BYTES", 50_000)
    output, runs = Output(tmp_path / "out"), tmp_path / "runs"
    (runs / "a" / "checkpoints").mkdir(parents=True)
    for name, content in {
        "a/metrics.jsonl": b"{}\n",
        "a/trace.json": os.urandom(60_000),
        "a/encoder.safetensors": b"weights",
        "a/checkpoints/step.json": b"{}",
    }.items():
        (runs / name).write_bytes(content)
    output.pack_runs(runs)
    with tarfile.open(output.runs) as archive:
        assert set(archive.getnames()) == {"a/metrics.jsonl", "left-out.txt"}
    assert output.runs.stat().st_size <= 50_000
    assert "a/trace.json: 60000 bytes" in output.faults[0]


def test_the_calls_fit_their_time_and_the_first_knows_what_it_needs(tmp_path: Path) -> None:
    asked = {number: list(calls.stages(number, where(tmp_path))) for number in calls.DEADLINES_S}
    for number, stages in asked.items():
        limits = [max(part.limit_s for part in stage) for stage in stages]
        assert sum(limits) <= calls.DEADLINES_S[number] + 10
        names = [part.name for stage in stages for part in stage]
        assert len(set(names)) == len(names)
        assert all(len(stage) == len({part.name for part in stage}) for stage in stages)
    assert calls.DEADLINES_S[1] + calls.DEADLINES_S[2] <= 760  # of 15 minutes, two starts of 60 to 70 s being in them
    assert calls.DEADLINES_S[3] < 600
    assert calls.DEADLINES_S[4] + calls.DEADLINES_S[5] < 820  # of 15 minutes, with two starts of 40 s
    benchmarks = [
        p.command for stages in asked.values() for s in stages for p in s if "benchmarks/bench.py" in p.command
    ]
    assert len(benchmarks) == 8
    for command in benchmarks:
        assert command[command.index("--without") + 1] == "compile"
        assert command[command.index("--commit") + 1] == "abc"


def test_a_rehearsal_has_more_patience_than_a_gpu(tmp_path: Path) -> None:
    rehearsal = dataclasses.replace(where(tmp_path), device="cpu")
    for number in (1, 2, 4):
        limits, patient = (
            {p.name: p.limit_s for s in calls.stages(number, w) for p in s} for w in (where(tmp_path), rehearsal)
        )
        common = limits.keys() & patient.keys()
        assert common
        assert all(patient[name] == calls.PATIENCE * limits[name] for name in common)
        for part in (each for stage in calls.stages(number, rehearsal) for each in stage if "--limit" in each.command):
            assert float(part.command[part.command.index("--limit") + 1]) > part.limit_s - calls.PATIENCE * 20


def test_what_a_gpu_is_asked_is_understood(tmp_path: Path) -> None:
    trained = set()
    for number in calls.DEADLINES_S:
        for command in (part.command for stage in calls.stages(number, where(tmp_path)) for part in stage):
            if "benchmarks/bench.py" in command:
                args = bench.parser().parse_args(command[2:])
                asked = [
                    c for c in bench.cases_of(args, "cuda") if bench.is_chosen(c, only=args.only, without=args.without)
                ]
                assert any(case.implementation.startswith("fastbyol") for case in asked)
                for text in args.only:
                    assert any(bench.is_chosen(case, only=[text], without=()) for case in asked), text
            elif "--" in command:
                args = train.build_parser().parse_args(command[command.index("--") + 1 :])
                args.device, args.engine = "cpu", None  # a GPU is not here to be chosen
                args.val = "val.beton"  # which training.py adds
                train.check_texts(args)
                trained.add(config_of(args, RunFolder(tmp_path)).recipe.name.partition("+")[0])
    assert trained == {"cifar10_rn18", "imagenet_rn50", "imagenette_rn18"}


def test_the_best_of_the_changes_trains_on(tmp_path: Path) -> None:
    place = where(tmp_path)
    scores = {"today": 40.0, "negatives-fade": 50.0, "simclr": 60.0, "simclr-muon": 65.0}
    rows = [{"case": "training", "shape": f"{name}, batch 512", "knn_top1": knn} for name, knn in scores.items()]
    place.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
    *_, swept, trained_on = calls.fifth(place)
    assert len(swept) == len(calls.CHANGES)
    assert [each.name for each in trained_on] == ["training negatives-fade-long", "training simclr-muon-long"]
    place.rows.unlink()
    assert calls.best_of(place.rows, ["today", "negatives-fade"]) == "today"
    *_, trained_on = calls.fifth(dataclasses.replace(place, device="cpu"))
    assert [each.name for each in trained_on] == [f"training {name}-long" for name in calls.REHEARSED]


def test_every_command_that_runs_on_a_gpu_is_understood(tmp_path: Path) -> None:
    for words in commands.TRAININGS.values():
        args = train.build_parser().parse_args([word.format(val="val.beton") for word in words])
        args.data, args.device, args.epochs, args.warmup_epochs = "train.beton", "cpu", 1.0, 0.2
        train.check_texts(args)
        config_of(args, RunFolder(tmp_path))


def test_a_command_that_fails_or_hangs_is_a_row_that_says_so(tmp_path: Path) -> None:
    now_s = time.monotonic()
    (wrong,) = commands.run({"wrong": ["prep", "write"]}, tmp_path, deadline=now_s + 60)
    assert wrong["error"] == "failed: status 2"
    assert "required" in wrong["traceback"]
    (hangs,) = commands.run({"hangs": ["train", "demo", "--out", str(tmp_path / "run")]}, tmp_path, deadline=now_s)
    assert hangs["error"] == "failed: stopped by the time limit"


def test_failed_tests_run_again(tmp_path: Path) -> None:
    place = where(tmp_path)
    assert calls.second(place)[0][0].command[-2:] == ("tests/kernels", "tests/gpu")  # all where no list is carried
    place.carried.mkdir()
    (place.carried / "failed.txt").write_text("tests/a.py::b[1 c]\ntests/a.py::d\ntests/a.py::d\n")
    assert calls.second(place)[0][0].command[-2:] == ("tests/a.py::b[1 c]", "tests/a.py::d")


@pytest.mark.slow
def test_a_failing_test_is_named_and_printed_at_once(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import time\ndef test_fails():\n    assert 'why' == 0\ndef test_hangs():\n    time.sleep(60)\n"
    )
    command = (sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.failures", "-c", "/dev/null")
    command += ("--failures", str(tmp_path / "failed.txt"), "--rootdir", str(tmp_path), str(tmp_path))
    environment = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    (outcome,) = carried_out([Part("tests", command, 4.0, environment)], tmp_path / "out")
    assert outcome.status == "failed: stopped after 4 s"
    assert (tmp_path / "failed.txt").read_text() == "test_it.py::test_fails\n"
    assert "assert 'why' == 0" in (tmp_path / "out" / "log.txt").read_text().split("KeyboardInterrupt")[0]


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def test_archives_are_unpacked_by_split_and_class(tmp_path: Path) -> None:
    members = {f"cifar10/{split}/cat/{i:02}.jpg": b"x" for split in ("train", "test") for i in range(10)}
    unpacked = images.unpack([archive(tmp_path / "c.tar.gz", members)], tmp_path / "out", every=5)
    assert unpacked == {"train": 2, "val": 2}
    one = {f"s/val/{label}/{i:02}.JPEG": b"x" for label in ("a", "b") for i in range(5)} | {"s/../../evil.jpg": b"x"}
    images.unpack([archive(tmp_path / "s.tar.gz", one)], tmp_path / "one", every=1)
    images.hold_out(tmp_path / "one")
    assert {split: len(list((tmp_path / "one" / split).glob("*/*"))) for split in ("train", "val")} == {
        "train": 8,
        "val": 2,
    }
    bad = [archive(tmp_path / "bad.tar.gz", {"a.txt": b""})]
    with pytest.raises(ValueError, match="holds no image"):
        images.unpack(bad, tmp_path / "bad", every=1)
    with pytest.raises(ValueError, match="no image"):
        images.copy(bad, tmp_path / "bad")


def test_photographs_become_as_many_files_as_copies(tmp_path: Path) -> None:
    source = archive(tmp_path / "imagenet-full.tar.gz", {"set/a.JPEG": b"first", "set/b.JPEG": b"second", "set/c": b""})
    assert images.archives(tmp_path, "photographs") == [source]
    assert images.archives(tmp_path, "imagenette") == []
    assert images.copy([source], tmp_path / "out") == 2
    files = sorted((tmp_path / "out").glob("*/*"))
    assert len(files) == 2 * images.COPIES
    assert {path.read_bytes() for path in files} == {b"first", b"second"}


def rows_of_steps(*steps: int, loss: float = 1.0) -> list[dict[str, float]]:
    return [{"step": step, "loss": loss} for step in steps]


def test_a_resumed_run_misses_no_step_and_learns_the_same() -> None:
    whole = rows_of_steps(1, 2, 3)
    assert resume.compare(whole, rows_of_steps(1, 2, 3)) is None
    for steps in ((1, 3), (1, 2, 2, 3), (1, 3, 2)):
        assert "steps" in str(resume.compare(whole, rows_of_steps(*steps)))
    assert "loss" in str(resume.compare(whole, rows_of_steps(1, 2, 3, loss=1.2)))
    assert "loss" in str(resume.compare(whole, rows_of_steps(1, 2, 3, loss=float("nan"))))


def test_counters_are_read_from_the_profilers_table() -> None:
    text = '==PROF== Connected\n"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
    text += '"0","stats_kernel(x)","DRAM Throughput","%","81.5"\n"0","stats_kernel(x)","Duration","us","120.1"\n'
    assert tools.counters(text) == {"stats_kernel": {"dram_percent": "81.5", "duration": "120.1 us"}}
    assert tools.counters("==ERROR== ERR_NVGPUCTRPERM") == {}


def row(implementation: str, **more: object) -> dict[str, object]:
    named = {"case": "step", "shape": "imagenet_rn50, batch 512", "dtype": "bfloat16", "implementation": implementation}
    return {**named, "error": None, **more}


def test_predictions_stand_beside_what_was_measured_and_misses_are_marked() -> None:
    found = [
        row("fastbyol, graph", p50_ms=1.0, images_per_s=1500.0, copy_gb_per_s=2900.0),
        row("fastbyol, graph, lagged target", p50_ms=1.0, images_per_s=1.0),
        row("eager, a forward per view", p50_ms=1.0, images_per_s=1000.0),
    ]
    text = predictions.markdown(found, str(FACTS["gpu"]))
    assert "| 1500 | H100 | 2900 to 2925 | 3182 | >= 2200 | aim missed; the prediction missed by over 15 %" in text
    assert "times | 1.5 | H100 |  |  | >= 1.35 | aim met |" in text
    assert "H200" not in text
    assert "| 1500 |" not in predictions.markdown(found, None)


def test_the_summary_says_what_failed_and_where_it_stands_whole() -> None:
    outcomes = [Outcome("views", "failed: exit status 1", 3.0, ("Traceback", "ValueError: why"))]
    broken = row("fastbyol", p50_ms=None, traceback="Traceback\n  in kernel\nRuntimeError: illegal access\n")
    text = summary.markdown("Call 1", FACTS, outcomes, [broken, row("x", case="score")], ["smi.csv is missing"])
    for piece in (
        "ValueError: why",
        "grep 'views |' log.txt",
        "in kernel\nRuntimeError",
        "- smi.csv is missing",
        "H100",
    ):
        assert piece in text


def test_what_is_carried_fits_and_what_does_not_is_said(tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("images", "small", "large", "tiny")}
    for path, size in zip(files.values(), (50, 10, 40, 5), strict=True):
        path.write_bytes(bytes(size))
    required, optional = [files["images"], files["small"]], [files["large"], files["tiny"]]
    taken, left = carry.chosen(30, required, optional, limit=100)
    assert taken == [*required, files["tiny"]]
    assert left == ["left out: large, 40 bytes, 30 too many"]
    with pytest.raises(carry.TooLarge, match=r"95 bytes do not travel, 94 do: the tree 35, images 50.*drop 1 bytes"):
        carry.chosen(35, required, optional, limit=94)


def test_the_tree_counts_tracked_and_untracked_files_but_no_ignored_ones(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    for name, content in {".gitignore": "no\n", "tracked": "12345", "new": "123", "no": "12345678"}.items():
        (tmp_path / name).write_text(content)
    subprocess.run(["git", "add", "tracked"], cwd=tmp_path, check=True)
    assert carry.tree_bytes(tmp_path) == 3 + 5 + 3
    with pytest.raises(FileNotFoundError, match="no git repository"):
        carry.tree_bytes(tmp_path / "new")


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = subprocess.run(
        [*CALL, "1", "--out", tmp_path / "file" / "out"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("call.py: error: ")
    assert done.stderr.count("\n") == 1


def cpu_of_others_s() -> float:
    """Return the CPU-seconds that have gone into what neither this process nor its ended children computed."""
    return usage().machine_cpu_s - sum(os.times()[:4])


@pytest.mark.slow
@pytest.mark.parametrize("ends_by", ["deadline", "signal"])
def test_a_call_cut_short_writes_its_summary(ends_by: str, tmp_path: Path) -> None:
    out, seconds = tmp_path / "out", 15.0 if ends_by == "deadline" else 100.0
    command = [*CALL, "3", "--out", out, "--work", tmp_path / "work", "--carried", tmp_path / "none", "--device", "cpu"]
    began, others_s = time.monotonic(), cpu_of_others_s()
    command += ["--deadline", str(seconds)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if ends_by == "signal":
        while "training imagenette" not in ((out / "log.txt").read_text() if (out / "log.txt").exists() else ""):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
    said, failed = process.communicate()
    assert process.returncode == (1 if ends_by == "deadline" else 75)
    took_s = time.monotonic() - began
    share_of_others = (cpu_of_others_s() - others_s) / took_s / (os.cpu_count() or 1)
    text = (out / "summary.md").read_text()
    assert text in said
    reason = {"deadline": "no time was left", "signal": "a signal came"}[ends_by]
    assert f"| training cifar10-long | 0 | not run: {reason} |" in text
    assert failed.splitlines()[-1] == f"training cifar10-long: not run: {reason}"
    assert "stopped" in text
    found = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    parts = [row for row in found if row["case"] == "part"]
    assert len(parts) == 3
    assert all(row["torch"] and row["hardware"] for row in found)
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) <= FILES_MAX
    assert all(path.stat().st_size <= FILE_BYTES and path.parent == out for path in files)
    if ends_by == "deadline" and took_s >= seconds + 1 and share_of_others > 0.6:
        pytest.skip("other programs keep this machine's cores busy")
    assert ends_by == "signal" or took_s < seconds + 1
