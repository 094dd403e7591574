"""A training of a call, by the command that users give, and the row that its files give.

`training.py NAME --rows FILE --out DIR [--score PROTOCOL ...] -- ARGUMENTS OF fastbyol-train`
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, from a checkout

from benchmarks.gpu.output import append_row
from fastbyol.monitor.metrics import read_metrics

OPERATIONS = 12  # lines of the profile's table that are printed
OF_RESULT = (
    "steps",
    "epochs",
    "images_per_s",
    "knn_top1",
    "knn_top1_random_init",
    "elapsed_s",
    "overrun_s",
    "skipped_steps",
)


def row_of(name: str, out: Path) -> dict[str, Any]:
    """Sum up a run folder: its result, and of its rows after the first, medians that a cold start does not move."""
    config = json.loads((out / "config.json").read_text())
    rows = read_metrics(out / "metrics.jsonl")
    warm = rows[1:] or rows
    recipe = config["recipe"]
    row: dict[str, Any] = {
        "case": "training",
        "shape": f"{name}, batch {recipe['batch_size']}, {recipe['crop_px']} px",
        "dtype": config["precision"],
        "implementation": f"fastbyol, {config['engine']}, loader {config['loader']}",
        "error": None if (out / "result.json").exists() else "failed: the run left no result.json",
    }
    if (out / "result.json").exists():
        result = json.loads((out / "result.json").read_text())
        row |= {key: result.get(key) for key in OF_RESULT}
    if warm:
        row["warm_images_per_s"] = _median(warm, "images_per_s")
        row["loader_wait_share"] = _median(warm, "loader_wait_share")
        row["gpu_idle_share"] = _median(warm, "gpu_idle_share")
        row["mfu"] = _median(warm, "mfu")
        row["peak_gib"] = max((each["peak_gib"] for each in rows if each.get("peak_gib")), default=None)
        row["last_loss"] = rows[-1]["loss"]
    return row


def _median(rows: list[dict[str, Any]], key: str) -> float | None:
    found = sorted(row[key] for row in rows if row.get(key) is not None)
    return found[len(found) // 2] if found else None


def scored(protocol: str, out: Path, train: str, val: str, *more: str) -> dict[str, Any]:
    """Score a run by fastbyol-eval and return its row."""
    command = [sys.executable, "-m", "fastbyol.eval", protocol, str(out), "--train", train, "--val", val, "--json"]
    done = subprocess.run([*command, *more], stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, flush=True)
    named = {"case": "score", "shape": out.name, "dtype": "", "implementation": protocol}
    if done.returncode:
        return named | {"error": f"failed: fastbyol-eval {protocol} ended with status {done.returncode}"}
    result = json.loads(done.stdout.splitlines()[-1])
    top1 = {"top1": result["trained"]["top1"], "top1_random_init": result.get("random_init", {}).get("top1")}
    return named | top1 | {"error": None, "scores": result}


def main() -> int:
    """Train, score what was asked for, leave a row each; return 1 where any of it failed."""
    parser = argparse.ArgumentParser(prog="training.py", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--rows", type=Path, required=True, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--facts", type=Path, metavar="FILE", help="the machine, for the rows")
    parser.add_argument("--score", action="append", default=[], metavar="PROTOCOL")
    parser.add_argument("--val", metavar="F.beton", help="to score on; also given to the training")
    own, arguments = sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
    args = parser.parse_args(own)
    # an interrupt is for the training, which ends with a checkpoint; its row follows
    signal.signal(signal.SIGINT, lambda *_: None)
    given = [*arguments, *(("--val", args.val) if args.val else ())]
    command = [sys.executable, "-m", "fastbyol.train", *given, "--out", str(args.out)]
    print(" ".join(command), flush=True)
    status = subprocess.run([*command, "--overwrite"], check=False).returncode
    print(f"status {status}", flush=True)
    facts = json.loads(args.facts.read_text()) if args.facts and args.facts.exists() else {}
    rows = []
    if (args.out / "config.json").exists():
        rows.append(row_of(args.name, args.out))
    else:
        named = {"case": "training", "shape": args.name, "dtype": "", "implementation": "fastbyol"}
        rows.append(named | {"error": "failed: no run folder was made"})
    if status:
        rows[0]["error"] = f"failed: fastbyol-train ended with status {status}"
    operations = args.out / "profile" / "operations.txt"
    if operations.exists():
        print("\n".join(line[:200] for line in operations.read_text().splitlines()[:OPERATIONS]), flush=True)
    append_row(args.rows, rows[0] | facts)
    if not status:
        train = arguments[arguments.index("--data") + 1]
        for protocol in args.score:
            name, *more = protocol.split()
            rows.append(scored(name, args.out, train, args.val, *more))
            append_row(args.rows, rows[-1] | facts)
    return int(any(row["error"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
