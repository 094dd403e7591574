"""python benchmarks/gpu/call.py 1|2|3|4|5 --out DIR: a call of a few minutes on a borrowed GPU, everything kept in DIR.

Each part is a group of processes with a time limit, and none hides another. Without a GPU the same parts run in a
reduced form: a rehearsal. What comes out: benchmarks/gpu/output.py; what is carried along: benchmarks/gpu/carry.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, from a checkout

from benchmarks.gpu import calls, summary
from benchmarks.gpu.output import Output
from benchmarks.gpu.parts import Outcome, Part, run

ROOT = Path(__file__).parents[2]
INTERRUPTED, BAD_USAGE = 75, 2
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
MACHINE_S = 60.0  # for the first import of torch on a cold disk; a rehearsal has more patience
PACK_EVERY_S = 60.0  # runs.tar.gz, while a part runs
SMI_FIELDS = "timestamp,utilization.gpu,utilization.memory,memory.used,power.draw,clocks.sm,clocks.mem,temperature.gpu"
MACHINE = """
import json, sys, torch
from benchmarks import rows
device = "cuda" if torch.cuda.is_available() else "cpu"
print(json.dumps({"device": device} | rows.place(device, sys.argv[1] or None)))
"""


class Call:
    """A call under way: its output, what ended so far, and how it is stopped."""

    def __init__(self, number: int, output: Output, *, deadline: float, work: Path) -> None:
        self.number, self.output, self.deadline, self.work = number, output, deadline, work
        self.stopped = threading.Event()
        self.outcomes: list[Outcome] = []
        self.facts: dict[str, Any] = {}
        self._packed_at = time.monotonic()

    def run(self, stage: Sequence[Part], environment: Mapping[str, str]) -> list[Outcome]:
        """Run a stage, keep what it made, and write the summary as it now stands."""
        limits = ", ".join(f"{part.name} (at most {part.limit_s:.0f} s)" for part in stage)
        print(f"== {limits}", flush=True)
        for part in stage:
            self.output.say(part.name, f"== {' '.join(part.command)}")
        ended = run(
            stage,
            root=ROOT,
            environment=environment,
            say=self.output.say,
            deadline=self.deadline,
            stopped=self.stopped,
            meanwhile=self._pack_now_and_then,
        )
        for outcome in ended:
            self.output.end(outcome.name)
            self.output.say(outcome.name, f"== {outcome.status}, {outcome.seconds:.1f} s")
            print(f"{outcome.name:24} {outcome.seconds:5.0f} s  {outcome.status}", flush=True)
            self._leave_row(outcome)
        self.outcomes += ended
        self.write()
        return ended

    def _leave_row(self, outcome: Outcome) -> None:
        row = {"case": "part", "shape": f"call {self.number}", "dtype": "", "implementation": outcome.name}
        error = None if outcome.status == "ok" else outcome.status.replace("skipped:", "absent:")
        self.output.add_row(row | {"seconds": round(outcome.seconds, 1), "error": error} | self.facts)

    def _pack_now_and_then(self) -> None:
        if time.monotonic() - self._packed_at > PACK_EVERY_S:
            self.write()

    def write(self) -> None:
        """Write the runs and the summary anew."""
        self.output.pack_runs(self.work / "runs")
        title = f"Call {self.number}"
        rows = self.output.read_rows()
        self.output.write_summary(summary.markdown(title, self.facts, self.outcomes, rows, self.output.faults))
        self._packed_at = time.monotonic()


def unpack_wheels(carried: Path, site: Path) -> list[str]:
    """Unpack the carried wheels to a folder for PYTHONPATH; nothing is installed. Returns their names."""
    site.mkdir(parents=True, exist_ok=True)
    wheels = sorted(carried.glob("*.whl"))
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    return [wheel.name for wheel in wheels]


def environment_of(work: Path) -> dict[str, str]:
    """Return the parts' environment: the tree and the wheels importable, caches in one place, NCCL on lo."""
    paths = [str(ROOT), str(work / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "NCCL_SOCKET_IFNAME": "lo",
        "TRITON_CACHE_DIR": str(work / "triton"),
        "COLUMNS": "150",
    }


def machine(commit: str, environment: Mapping[str, str], *, limit_s: float) -> tuple[dict[str, Any], str]:
    """Ask a process of its own what this machine is; return that, or what went wrong in the asking."""
    command = [sys.executable, "-c", MACHINE, commit]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        return {}, f"torch was not imported within {limit_s:.0f} s"
    if done.returncode:
        return {}, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts, done.stderr


def start_smi(output: Output) -> subprocess.Popen[bytes] | None:
    """Let nvidia-smi write a line a second, where there is one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    with output.smi.open("wb") as file:
        command = [program, f"--query-gpu={SMI_FIELDS}", "--format=csv", "--loop=1"]
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    described = argparse.ArgumentParser(prog="call.py", description=__doc__)
    described.add_argument("number", type=int, choices=tuple(calls.DEADLINES_S))
    given = os.environ.get("OUT")
    described.add_argument(
        "--out", type=Path, required=not given, default=given, metavar="DIR", help="default: the variable OUT"
    )
    described.add_argument("--carried", type=Path, default=ROOT / "carried", metavar="DIR", help="made by carry.py")
    described.add_argument("--deadline", type=float, metavar="SECONDS", help=f"of the call: {calls.DEADLINES_S}")
    described.add_argument("--commit", default="", metavar="TEXT", help="of a tree without git; carry.py notes it")
    described.add_argument("--device", choices=("cuda", "cpu"), help="the GPU if there is one")
    described.add_argument(
        "--sets", default=",".join(calls.SETS), metavar="NAMES", help="of call 3, which share its time"
    )
    described.add_argument(
        "--work", type=Path, metavar="DIR", help="for images, runs and caches; the next call finds them there"
    )
    return described


def main() -> int:
    """Run a call; return 0 when all parts did, 1 where one failed, 2 for bad usage, 75 when a signal stopped it."""
    began = time.monotonic()
    args = parser().parse_args()
    sets = args.sets.split(",")
    if not set(sets) <= set(calls.SETS):
        print(f"call.py: error: no set of images {args.sets!r}; give some of {','.join(calls.SETS)}", file=sys.stderr)
        return BAD_USAGE
    deadline_s = args.deadline or calls.DEADLINES_S[args.number]
    work = (args.work or Path(tempfile.gettempdir()) / "fastbyol-gpu").resolve()
    try:
        output = Output(args.out.resolve())
        shutil.rmtree(work / "runs", ignore_errors=True)
        (work / "runs").mkdir(parents=True)
        wheels = unpack_wheels(args.carried, work / "site")
    except OSError as error:
        print(f"call.py: error: {error}; give --out and --work folders that can be written to", file=sys.stderr)
        return BAD_USAGE
    call = Call(args.number, output, deadline=began + deadline_s, work=work)

    def stop(_number: int, _frame: FrameType | None) -> None:
        call.stopped.set()

    for number in STOPPING:
        signal.signal(number, stop)
    environment = environment_of(work)
    noted = args.carried / "commit.txt"
    commit = args.commit or (noted.read_text().strip() if noted.exists() else "")
    limit_s = MACHINE_S * (calls.PATIENCE if args.device == "cpu" else 1.0)
    call.facts, said = machine(commit, environment, limit_s=limit_s)
    for line in (*said.splitlines(), f"wheels: {', '.join(wheels) or 'none were carried'}", json.dumps(call.facts)):
        output.say("machine", line)
    device = args.device or call.facts.pop("device", "cpu")
    call.facts.pop("device", None)
    if not call.facts:
        call.outcomes.append(Outcome("machine", "failed: torch does not work", 0.0, tuple(said.splitlines()[-5:])))
    (work / "facts.json").write_text(json.dumps(call.facts))
    if device == "cpu":
        environment["OMP_NUM_THREADS"] = "1"  # a rehearsal's threads would wait for one another beside other programs
    where = calls.Where(
        device, work, output.rows, output.failed, work / "facts.json", args.carried.resolve(), commit or None
    )
    if args.deadline is None:
        call.deadline = began + deadline_s * where.patience
    return carry_out(call, replace(where, deadline_s=deadline_s, sets=sets), environment)


def carry_out(call: Call, where: calls.Where, environment: Mapping[str, str]) -> int:
    """Run the stages between the start and the end of nvidia-smi; print the summary; return the exit status."""
    if not where.is_gpu:
        print("no GPU is used: a rehearsal, in reduced form", flush=True)
    smi = start_smi(call.output)
    call.output.failed.touch()
    try:
        for stage in calls.stages(call.number, where):
            call.run(stage, environment)
    finally:
        if smi is not None:
            smi.terminate()
            smi.wait()
        call.write()
    print(call.output.summary.read_text(), flush=True)
    for outcome in call.outcomes:  # last, where one who sees the end of a log looks
        if not outcome.is_ok:
            print("\n  ".join([f"{outcome.name}: {outcome.status}", *outcome.last_lines]), file=sys.stderr)
    if call.stopped.is_set():
        return INTERRUPTED
    return 0 if all(outcome.is_ok for outcome in call.outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
