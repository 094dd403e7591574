"""A soak of the trainer: budgets under disturbance, and kills at random moments. Resumable; writes docs/reliability.md.

Usage: python -m tests.support.soak [--budgets 30] [--kills 50] [--out runs/soak]; with --beside, only the budgets and
the table of threads beside other programs, whose rows go to a part of their own.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from fastbyol.monitor.metrics import read_metrics
from fastbyol.storage import checkpoint
from fastbyol.storage.run_folder import RunFolder

TRAIN = "from fastbyol.cli.start import train; sys.exit(train())"
SLOW_DISK = "import os, time; fsync = os.fsync; os.fsync = lambda file: (time.sleep(1), fsync(file))[1]; "
THIEF = "while True: pass"
COMING_AND_GOING = ("0 loops", "1 loop", "2 loops", "3 loops")  # that come and go
BESIDE_S = (43, 300)
BESIDE, KILLS = "## Beside other programs", "## Kills"
DISTURBANCES = ("none", "thieves", "late thieves", "slow disk", "pause")
OVERRUN_MAX_S, SHARE_MIN = 2.0, 0.93
KILLED_EPOCHS = 20
REPORT = Path(__file__).parents[2] / "docs" / "reliability.md"


def command(data: Path, out: Path, *more: str, disturbance: str = "none") -> list[str]:
    """Return the command of a small run on the demo set."""
    code = f"import sys; {SLOW_DISK if disturbance == 'slow disk' else ''}{TRAIN}"
    files = (f"--data={data / 'train.beton'}", f"--val={data / 'val.beton'}", f"--out={out}")
    return [sys.executable, "-c", code, "demo", *files, "--device=cpu", "--no-tensorboard", *more]


@contextmanager
def thieves(count: int = 2) -> Iterator[None]:
    """Keep cores busy with other things."""
    busy = [subprocess.Popen([sys.executable, "-c", THIEF]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def disturb(process: subprocess.Popen[str], disturbance: str, *, budget_s: float) -> None:
    """Do to a running process what the name says, over the middle third of its budget or from there to its end."""
    if disturbance == "pause":
        draw = random.Random(budget_s)
        time.sleep(budget_s * draw.uniform(0.2, 0.5))
        process.send_signal(signal.SIGSTOP)
        time.sleep(budget_s * draw.uniform(0.05, 0.25))
        process.send_signal(signal.SIGCONT)
    elif disturbance in COMING_AND_GOING:
        draw, loops = random.Random(budget_s), int(disturbance[0])
        while process.poll() is None:
            for count in (loops, 0):
                with thieves(count), suppress(subprocess.TimeoutExpired):
                    process.wait(draw.uniform(0.1, 0.3) * min(budget_s, 60))
    elif disturbance == "thieves":
        time.sleep(budget_s / 3)
        with thieves():
            time.sleep(budget_s / 3)
    elif disturbance == "late thieves":
        time.sleep(budget_s / 2)
        with thieves():
            process.wait()


def keep_budget(data: Path, out: Path, *more: str, budget_s: float, disturbance: str) -> dict[str, Any]:
    """Train within a budget while something disturbs it; return how it ended."""
    asked = command(data, out, f"--budget={budget_s:g}s", "--overwrite", *more, disturbance=disturbance)
    began_s = time.monotonic()
    process = subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    disturb(process, disturbance, budget_s=budget_s)
    _, said = process.communicate()
    wall_s = time.monotonic() - began_s
    last = (read_metrics(RunFolder(out).metrics) or [{}])[-1]
    row = {"budget_s": budget_s, "disturbance": disturbance, "wall_s": wall_s, "status": process.returncode}
    ends = {name: last.get(name) for name in ("progress", "lr", "tau", "step")}
    ends["beside_share"] = beside_share(read_metrics(RunFolder(out).metrics))
    result = RunFolder(out).result
    ends["knn_top1"] = json.loads(result.read_text())["knn_top1"] if result.exists() else None
    return {**row, **ends, "said": said[-2000:] if process.returncode else ""}


def beside_share(rows: list[dict[str, Any]]) -> float:
    """Return the share of the loop's time that went into neither waiting for data, nor views, nor the step."""
    loop_s = sum(row["interval_s"] for row in rows)
    spent_s = sum(row[name] for row in rows for name in ("loader_wait_s", "views_s", "step_s"))
    return 1 - spent_s / loop_s if rows else 0.0


def is_kept(row: dict[str, Any]) -> bool:
    """Return whether a budget's row is as promised."""
    ends = (row["status"], row["progress"], row["lr"], row["tau"]) == (0, 1.0, 0.0, 1.0)
    return ends and SHARE_MIN * row["budget_s"] <= row["wall_s"] <= row["budget_s"] + OVERRUN_MAX_S


def budgets(data: Path, out: Path, count: int) -> list[dict[str, Any]]:
    """Run `count` budgets between 20 and 120 s, each disturbance in turn; those done before are kept."""
    file = out / "budgets.jsonl"
    rows = read_metrics(file)
    draw = random.Random(0)
    asked = [(round(20 * 6 ** draw.random()), DISTURBANCES[number % len(DISTURBANCES)]) for number in range(count)]
    for budget_s, disturbance in tqdm(asked[len(rows) :], desc="budgets", unit="run"):
        rows.append(keep_budget(data, out / "budget", budget_s=budget_s, disturbance=disturbance))
        with file.open("a") as written:
            written.write(json.dumps(rows[-1]) + "\n")
    return rows[:count]


def beside(data: Path, out: Path) -> list[dict[str, Any]]:
    """Run the budgets beside loops that come and go; those done before are kept."""
    file = out / "beside.jsonl"
    rows = read_metrics(file)
    asked = [(budget_s, loops) for budget_s in BESIDE_S for loops in COMING_AND_GOING]
    for budget_s, loops in tqdm(asked[len(rows) :], desc="beside", unit="run"):
        rows.append(keep_budget(data, out / "budget", budget_s=budget_s, disturbance=loops))
        with file.open("a") as written:
            written.write(json.dumps(rows[-1]) + "\n")
    return rows


def paces(data: Path, out: Path) -> list[dict[str, float]]:
    """Measure images/s by default, with one thread and with two, beside 0, 1 and 2 loops."""
    rows = []
    for loops in range(3):
        row: dict[str, float] = {"loops": loops}
        for name, more in (("default", ()), ("1", ("--threads=1",)), ("2", ("--threads=2",))):
            with thieves(loops):
                asked = command(data, out / "pace", "--budget=40s", "--overwrite", *more)
                subprocess.run(asked, check=True, capture_output=True)
            row[name] = json.loads(RunFolder(out / "pace").result.read_text())["images_per_s"]
        rows.append(row)
    return rows


def beside_summary(rows: list[dict[str, Any]], paced: list[dict[str, float]]) -> str:
    """Write the part about other programs as Markdown."""
    lines = [
        BESIDE,
        "",
        "Endless loops on the two cores that come and go, each time for 4 to 18 s; kNN top-1 is of the end of the run.",
        "",
        "| budget s | loops | wall s | used | steps | kNN | kept |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        share, knn = row["wall_s"] / row["budget_s"], row["knn_top1"]
        cells = (row["budget_s"], row["disturbance"][0], f"{row['wall_s']:.1f}", f"{share:.1%}", row["step"])
        said = "given up" if knn is None else f"{knn:.1f}"
        lines.append(f"| {' | '.join(map(str, cells))} | {said} | {'yes' if is_kept(row) else '**no**'} |")
    if paced:
        lines += [
            "",
            "Images/s in 40 s, by threads, beside loops that stay:",
            "",
            "| loops | default | 1 | 2 |",
            "|---|---|---|---|",
        ]
        lines += [f"| {row['loops']} | {row['default']:.0f} | {row['1']:.0f} | {row['2']:.0f} |" for row in paced]
    return "\n".join(lines)


def with_part(text: str, part: str) -> str:
    """Put the part about other programs before that about kills, in place of an older one."""
    before, _, kills_part = text.partition(KILLS)
    return f"{before.partition(BESIDE)[0]}{part}\n\n{KILLS}{kills_part}"


def is_same(a: Path, b: Path) -> bool:
    """Return whether two runs exported the same encoder, bit for bit."""
    first, second = (load_file(RunFolder(out).encoder) for out in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def unreadable(folder: Path) -> int:
    """Count the checkpoints of a run that do not load."""
    try:
        _, damaged = checkpoint.load_newest(RunFolder(folder).checkpoints)
    except checkpoint.CheckpointError:
        return int(checkpoint.exists(RunFolder(folder).checkpoints))
    return len(damaged)


def kills(data: Path, out: Path, count: int) -> dict[str, Any]:
    """Kill a run `count` times at random moments, resume it each time, and compare it with one left alone."""
    more = (f"--epochs={KILLED_EPOCHS}", "--checkpoint-every=0.2s", "--resume")
    alone, killed, record = out / "alone", out / "killed", out / "kills.json"
    subprocess.run(command(data, alone, *more), check=True, capture_output=True)
    row = json.loads(record.read_text()) if record.exists() else {"kills": 0, "without_a_row": 0, "unreadable": 0}
    draw = random.Random(row["kills"])
    with tqdm(total=count, initial=row["kills"], desc="kills", unit="kill") as bar:
        while row["kills"] < count:
            process = subprocess.Popen(command(data, killed, *more), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            before = len(read_metrics(RunFolder(killed).metrics))
            try:
                _, said = process.communicate(timeout=draw.uniform(0, 12))
                return {
                    **row,
                    "stopped": f"it ended by itself with status {process.returncode}: {said.decode()[-500:]}",
                }
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
            row["kills"] += 1
            row["without_a_row"] += len(read_metrics(RunFolder(killed).metrics)) <= before
            row["unreadable"] += unreadable(killed)
            record.write_text(json.dumps(row))
            bar.update()
    last = subprocess.run(command(data, killed, *more), check=False, capture_output=True, text=True)
    if last.returncode:
        return {**row, "stopped": f"it did not resume: {last.stderr[-500:]}"}
    steps = read_metrics(RunFolder(killed).metrics)[-1]["step"]
    return {**row, "stopped": "", "is_bit_equal": is_same(alone, killed), "steps": steps}


def _told_of_kills(killed: dict[str, Any], equal: str) -> str:
    if killed["stopped"]:
        return f"After {killed['kills']} kills: {killed['stopped']}"
    return (
        f"{killed['kills']} times `kill -9` at a random moment of 0 to 12 s after the start of a process, "
        f"{killed['without_a_row']} of them before its first row of metrics. Every restart resumed; "
        f"{killed['unreadable']} checkpoints did not load. After {killed['steps']} steps the encoder is {equal} to "
        "that of a run left alone."
    )


def summary(rows: list[dict[str, Any]], killed: dict[str, Any]) -> str:
    """Write what happened as Markdown."""
    kept, shares = sum(map(is_kept, rows)), [row["wall_s"] / row["budget_s"] for row in rows]
    asked_s = [row["budget_s"] for row in rows]
    beside = [row["beside_share"] for row in rows]
    equal = "bit-equal" if killed.get("is_bit_equal") else "**not** bit-equal"
    lines = [
        "# Reliability",
        "",
        "Written by `make soak`: the demo recipe on two CPU cores, each run a process of its own, timed from outside.",
        "",
        "## Budgets",
        "",
        f"{len(rows)} budgets of {min(asked_s)} to {max(asked_s)} s, from process start to exit. Promise: status 0, "
        f"progress 1, lr 0, tau 1, at most {OVERRUN_MAX_S:g} s over and at least {SHARE_MIN:.0%} used. **{kept} of "
        f"{len(rows)} kept it**; they used {min(shares):.1%} to {max(shares):.1%}.",
        "",
        "Thieves: two processes that take both cores in the middle third, or from the middle to the end (late). Slow "
        "disk: every fsync takes a second longer. Pause: SIGSTOP from somewhere between a fifth and half of the "
        "budget, for up to a quarter of it.",
        "",
        f"Rows, watchdogs, checkpoints and the clock took {min(beside):.2%} to {max(beside):.2%} of the loop's time "
        f"(median {median(beside):.2%}); the rest was waiting for data, views and steps.",
        "",
        "| budget s | disturbance | wall s | over s | used | steps | kept |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        over_s, share = row["wall_s"] - row["budget_s"], row["wall_s"] / row["budget_s"]
        cells = (row["budget_s"], row["disturbance"], f"{row['wall_s']:.1f}", f"{over_s:+.1f}", f"{share:.1%}")
        lines.append(f"| {' | '.join(map(str, cells))} | {row['step']} | {'yes' if is_kept(row) else '**no**'} |")
    lines += [
        "",
        "## Kills",
        "",
        _told_of_kills(killed, equal),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run what is asked for and write the summary; 0 when every promise was kept."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--budgets", type=int, default=30, metavar="N")
    parser.add_argument("--kills", type=int, default=50, metavar="N")
    parser.add_argument("--beside", action="store_true", help="run the cases beside other programs alone")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), metavar="DIR")
    args = parser.parse_args()
    data = args.out / "data"
    if not (data / "val.beton").exists():
        subprocess.run([sys.executable, "-m", "fastbyol.data_prep.cli", "demo", data, "--overwrite"], check=True)
    if args.beside:
        kept = beside(data, args.out)
        REPORT.write_text(with_part(REPORT.read_text(), beside_summary(kept, paces(data, args.out))))
        return 0 if all(is_kept(row) and row["knn_top1"] is not None for row in kept) else 1
    rows = budgets(data, args.out, args.budgets)
    killed = kills(data, args.out, args.kills)
    kept = beside(data, args.out)
    REPORT.write_text(with_part(summary(rows, killed), beside_summary(kept, paces(data, args.out))))
    print(f"{sum(map(is_kept, rows))} of {len(rows)} budgets kept; {killed}")
    is_whole = killed.get("is_bit_equal", False) and not killed["unreadable"]
    return 0 if is_whole and all(map(is_kept, rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
