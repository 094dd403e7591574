"""A training that is killed without warning and resumed, beside the same training left alone.

`resume.py --rows FILE --out DIR -- ARGUMENTS OF fastbyol-train`
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, from a checkout

from benchmarks.gpu.output import append_row
from fastbyol.monitor.metrics import read_metrics

LOSS_RTOL = 0.05  # a GPU's sums run in any order, so two runs agree in what they learn, not bit for bit
KILL_AT = 0.4  # of the run


def wait_for_progress(out: Path, progress: float, process: subprocess.Popen[bytes]) -> None:
    """Wait for a row of that progress and for a checkpoint; raise RuntimeError if the run ends before.

    However long it takes: the limit is that of the part of a call, which depends on the machine.
    """
    while not (
        list(out.glob("checkpoints/*.pt"))
        and any(r["progress"] >= progress for r in read_metrics(out / "metrics.jsonl"))
    ):
        if process.poll() is not None:
            raise RuntimeError(f"the run ended with status {process.returncode} before it could be killed")
        time.sleep(0.02)


def compare(whole: list[dict[str, Any]], resumed: list[dict[str, Any]]) -> str | None:
    """Describe how a resumed run's rows differ from those of a run left alone; None if they do not."""
    steps, expected = [row["step"] for row in resumed], [row["step"] for row in whole]
    if steps != expected:
        return f"failed: steps {steps[:3]}..{steps[-3:]} instead of {expected[:3]}..{expected[-3:]}"
    ours, theirs = resumed[-1]["loss"], whole[-1]["loss"]
    if not abs(ours - theirs) <= LOSS_RTOL * abs(theirs):
        return f"failed: last loss {ours:.4f} instead of {theirs:.4f}"
    return None


def main() -> int:
    """Run a training whole, kill another at a part of its steps, resume it, compare them; one row."""
    parser = argparse.ArgumentParser(prog="resume.py", description=__doc__)
    parser.add_argument("--rows", type=Path, required=True, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--facts", type=Path, metavar="FILE", help="the machine, for the rows")
    own, arguments = sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
    args = parser.parse_args(own)
    row: dict[str, Any] = {"case": "kill -9 and --resume", "shape": arguments[0], "dtype": "", "error": None}
    row["implementation"] = "fastbyol"
    try:
        row |= measure(arguments, args.out)
    except (RuntimeError, subprocess.CalledProcessError) as error:
        row["error"] = f"failed: {error}"
    except KeyboardInterrupt:  # the part's limit
        row["error"] = "failed: interrupted"
    facts = json.loads(args.facts.read_text()) if args.facts and args.facts.exists() else {}
    print(json.dumps(row), flush=True)
    append_row(args.rows, row | facts)
    return int(row["error"] is not None)


def measure(arguments: list[str], out: Path) -> dict[str, Any]:
    """Run one training whole and kill another beside it, resume that, and return what they showed."""
    command = [sys.executable, "-m", "fastbyol.train", *arguments, "--log-every", "1", "--checkpoint-every", "0.5s"]
    whole, killed = out / "whole", out / "killed"
    reference, process = (
        subprocess.Popen([*command, "--out", str(folder), "--overwrite"]) for folder in (whole, killed)
    )
    try:
        try:
            wait_for_progress(killed, KILL_AT, process)
        finally:
            process.kill()
            process.wait()
        rows = len(read_metrics(killed / "metrics.jsonl"))
        began = time.monotonic()
        subprocess.run([*command, "--out", str(killed), "--resume"], check=True)
        taken_s = time.monotonic() - began
        if reference.wait():
            raise RuntimeError(f"the run left alone ended with status {reference.returncode}")
    finally:
        reference.kill()
    left_alone, resumed = (read_metrics(folder / "metrics.jsonl") for folder in (whole, killed))
    result = f"killed at step {rows}, resumed to step {resumed[-1]['step']} in {taken_s:.1f} s; "
    result += f"last loss {resumed[-1]['loss']:.4f}, left alone {left_alone[-1]['loss']:.4f}"
    return {"result": result, "error": compare(left_alone, resumed)}


if __name__ == "__main__":
    sys.exit(main())
