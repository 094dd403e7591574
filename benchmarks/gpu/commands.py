"""Every command once on this machine, on the demo set: does each do its work, whoever's kernels it runs.

`commands.py --rows FILE --out DIR`. The trainings run beside one another, then what needs one of them; a row each. None
is timed for its speed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, from a checkout

from benchmarks.gpu.output import append_row

PROGRAMS = {
    "prep": ("-m", "fastbyol.data_prep.cli"),
    **{name: ("-c", f"from fastbyol.cli.start import {name}; {name}()") for name in ("train", "evaluate", "embed")},
}
SHORT = ("--epochs", "1", "--warmup-epochs", "0.2")
RUN = "plain"  # the training that the other commands take
TRAININGS = {
    RUN: ("demo", "--val", "{val}"),
    "auto": ("demo", "--method", "auto", "--val", "{val}"),
    "AdamW, timm": ("demo+encoder=timm:convnext_atto+optimizer=adamw+base_lr=2.5e-4+crop_px=32",),
    "local views": ("demo+local_views=2+local_predictor=true",),
    "coding rate": ("demo+target=online+predictor_depth=0+loss=coding-rate",),
    "micro-batches, gray": ("demo", "--channels", "1", "--micro-batches", "2"),
}
LATER = {
    "knn": ("evaluate", "knn", "{run}", "--train", "{train}", "--val", "{val}"),
    "linear": ("evaluate", "linear", "{run}", "--train", "{train}", "--val", "{val}", "--cached", "--epochs", "3"),
    "quality": ("evaluate", "quality", "{run}", "--train", "{train}"),
    "embed": ("embed", "{run}", "{val}", "--out", "{folder}/embedded.npz", "--overwrite"),
    "export": ("evaluate", "export", "{run}", "{folder}/exported.safetensors"),
}


def run(commands: Mapping[str, Sequence[str]], folder: Path, *, limit_s: float) -> list[dict[str, Any]]:
    """Run commands beside one another; return a row each, which holds the end of what a failed one printed."""
    began, started = time.monotonic(), {}
    for name, command in commands.items():
        log = (folder / f"{name.replace(' ', '-').replace(',', '')}.txt").open("w+")
        print(f"{name}: {' '.join(command)}", flush=True)
        words = [sys.executable, *PROGRAMS[command[0]], *command[1:]]
        started[name] = log, subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    rows = []
    for name, (log, process) in started.items():
        try:
            status = process.wait(timeout=max(began + limit_s - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = f"none after {limit_s:g} s"
        log.seek(0)
        said = log.read()
        log.close()
        error = None if status == 0 else f"failed: status {status}"
        row = {"case": "command", "shape": "the demo set", "dtype": "", "implementation": name, "error": error}
        rows.append(row | {"elapsed_s": round(time.monotonic() - began, 1)} | ({"traceback": said} if error else {}))
        print(f"== {name}: {error or 'ok'}\n{said}", flush=True)
    return rows


def main() -> int:
    """Draw the demo set, train, score, embed and export; return 1 where any of it failed."""
    parser = argparse.ArgumentParser(prog="commands.py", description=__doc__)
    parser.add_argument("--rows", type=Path, required=True, metavar="FILE")
    parser.add_argument("--facts", type=Path, metavar="FILE", help="the machine, for the rows")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--limit", type=float, default=60.0, metavar="SECONDS", help="for the trainings, and the rest")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    facts = json.loads(args.facts.read_text()) if args.facts and args.facts.exists() else {}
    where = {
        "folder": str(args.out),
        "run": str(args.out / "runs" / RUN),
        **{split: str(args.out / "images" / f"{split}.beton") for split in ("train", "val")},
    }
    images = ("prep", "demo", str(args.out / "images"), "--overwrite")
    common = ("--data", where["train"], *SHORT, "--device", args.device, "--workers", "1", "--overwrite")
    trainings = {
        name: ("train", *words, *common, "--out", str(args.out / "runs" / name))
        for name, words in TRAININGS.items()
        if "timm" not in name or importlib.util.find_spec("timm")  # a rehearsal's Python lacks it
    }
    later = {name: (*words, *(() if name == "export" else ("--device", args.device))) for name, words in LATER.items()}
    failed = False
    for commands in ({"demo": images}, trainings, later):
        named = {name: [word.format(**where) for word in words] for name, words in commands.items()}
        for row in run(named, args.out, limit_s=args.limit):
            failed |= row["error"] is not None
            append_row(args.rows, row | facts)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
