"""Training in several forms, scoring, embedding and export on this machine, on the demo set: does each do its work.

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
from collections.abc import Iterator, Mapping, Sequence
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
BY_TIMM = "AdamW, timm"
KEPT = 4000  # characters of what a failed command printed
TRAININGS = {
    RUN: ("demo", "--val", "{val}"),
    "auto": ("demo", "--method", "auto", "--val", "{val}"),
    BY_TIMM: ("demo+encoder=timm:convnext_atto+optimizer=adamw+base_lr=2.5e-4+crop_px=32",),
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


def run(commands: Mapping[str, Sequence[str]], folder: Path, *, deadline: float) -> Iterator[dict[str, Any]]:
    """Run commands beside one another; yield a row each, which holds the end of what a failed one printed.

    deadline: on time.monotonic's clock; what still runs then is ended.
    """
    started = {}
    for name, command in commands.items():
        log = (folder / f"{name.replace(' ', '-').replace(',', '')}.txt").open("w+")
        print(f"{name}: {' '.join(command)}", flush=True)
        words = [sys.executable, *PROGRAMS[command[0]], *command[1:]]
        started[name] = log, subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    for name, (log, process) in started.items():
        error = None
        try:
            status = process.wait(timeout=max(deadline - time.monotonic(), 0.1))
            error = f"failed: status {status}" if status else None
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            error = "failed: stopped by the time limit"
        log.seek(0)
        said = log.read()
        log.close()
        print(f"== {name}: {error or 'ok'}\n{said}", flush=True)
        yield _row(name, error) | ({"traceback": said[-KEPT:]} if error else {})


def _row(name: str, error: str | None) -> dict[str, Any]:
    return {"case": "command", "shape": "the demo set", "dtype": "", "implementation": name, "error": error}


def main() -> int:
    """Draw the demo set, train, score, embed and export; return 1 where any of it failed."""
    parser = argparse.ArgumentParser(prog="commands.py", description=__doc__)
    parser.add_argument("--rows", type=Path, required=True, metavar="FILE")
    parser.add_argument("--facts", type=Path, metavar="FILE", help="the machine, for the rows")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--limit", type=float, default=90.0, metavar="SECONDS", help="for all of it")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    deadline = time.monotonic() + args.limit
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
        name: ("train", *words, *common, "--out", str(args.out / "runs" / name)) for name, words in TRAININGS.items()
    }
    if importlib.util.find_spec("timm") is None:  # a rehearsal's Python lacks it
        del trainings[BY_TIMM]
        append_row(args.rows, _row(BY_TIMM, "absent: timm is not installed") | facts)
    later = {name: (*words, *(() if name == "export" else ("--device", args.device))) for name, words in LATER.items()}
    failed = False
    for commands in ({"demo": images}, trainings, later):
        named = {name: [word.format(**where) for word in words] for name, words in commands.items()}
        for row in run(named, args.out, deadline=deadline):
            failed |= row["error"] is not None
            append_row(args.rows, row | facts)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
