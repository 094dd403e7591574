"""What fastbyol-eval does with its flags: scores of a run's encoder by a protocol, or an export of it."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path

from fastbyol.beton import BetonError, Reader
from fastbyol.cli import export_run
from fastbyol.cli import table as tables
from fastbyol.cli.cache import Cache, folder_of
from fastbyol.cli.encoders import USUAL_PX, open_encoder, settle_px
from fastbyol.errors import ConfigError
from fastbyol.evaluate.features import check_classes
from fastbyol.evaluate.images import InputSettings
from fastbyol.evaluate.protocol import Files, Protocol
from fastbyol.evaluate.raw_pixels import RawPixels
from fastbyol.jpeg import require_pillow
from fastbyol.loaders import default_workers
from fastbyol.model.parts import Encoder, build_encoder
from fastbyol.report import evaluations
from fastbyol.storage.checkpoint import CheckpointError
from fastbyol.storage.run_folder import RunFolder
from fastbyol.storage.scores import Scores, load_scores, save_scores
from fastbyol.system import threads
from fastbyol.system.command_line import BAD_INPUT, DONE, INTERRUPTED, fail, naming_memory
from fastbyol.system.device import choose_device
from fastbyol.system.limits import available_cores
from fastbyol.system.signals import StopSignal

TITLES = {  # keys of encoders, in a summary
    "random_init": "random init",
    "raw_pixels": "raw pixels",
    "supervised": "supervised from scratch",
}
HEADLINES = {"score": "score", "miou": "mIoU", "top1": "top-1", "top5": "top-5"}  # keys of percentages
MEASURES = {  # keys of what is no percentage
    "rankme": "RankMe",
    "effective_rank": "effective rank",
    "alignment": "alignment",
    "uniformity": "uniformity",
}


def run(args: argparse.Namespace, protocol: Protocol | None) -> int:
    """Score by the protocol or, where it is None, do what the command says; return the exit status."""
    try:
        with StopSignal().catch(), naming_memory():
            require_pillow()
            if args.protocol == "table":
                return tables.main(args)
            scores = export_run.export(args, notify=_notify) if protocol is None else score(args, protocol)
    except KeyboardInterrupt:
        print("fastbyol-eval: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ConfigError, BetonError, CheckpointError, OSError) as error:
        return fail("fastbyol-eval", error, status=BAD_INPUT)
    print(json.dumps(scores) if args.json else summary(scores))
    return DONE


def score(args: argparse.Namespace, protocol: Protocol) -> Scores:
    """Score an encoder and its baselines, such as the same network as drawn, and save each score at once."""
    found = open_encoder(args.encoder, notify=_notify)
    device, folder = choose_device(args.device), found.folder
    args.run_dir = folder.path
    encoders: dict[str, Encoder] = {protocol.baseline if found.is_drawn else "trained": found.encoder}
    if protocol.scores_baseline(args) and not found.is_drawn:
        encoders[protocol.baseline] = build_encoder(found.config, seed=found.seed)
    workers = (args.workers if protocol.has_files else None) or default_workers(device, cores=available_cores())
    torch_threads = threads.make_tuner(args.threads, device, notify=_notify)
    on_error = args.on_error if protocol.has_files else "fail"
    px, margin = found.px or USUAL_PX, found.margin  # of no use to a protocol with images of its own
    if protocol.has_files:
        px, margin = settle_px(args.encoder, found, args.px), args.margin or margin
    if protocol.scores_raw_pixels:
        encoders["raw_pixels"] = RawPixels(px)
    inputs = InputSettings(px, margin, workers, device, on_error, threads=torch_threads)
    if protocol.has_files:
        cache = Cache(folder_of(folder.path, args.cache), tuple(args.prep), command="fastbyol-eval")
        args.train, args.val = cache.pair(args.train, args.val if protocol.has_val else args.train)
    with ExitStack() as stack:
        data = _open_files(args, protocol, stack) if protocol.has_files else None
        facts, job = protocol.prepare(args, data, inputs)
        places = {"train": args.train, "val": args.val} if protocol.has_files else {}
        scores: Scores = {"protocol": args.protocol, "run": args.encoder, **found.facts, **places, **facts}
        for name, encoder in encoders.items():
            scores[name] = job(encoder.to(device), f"{args.protocol} {name.replace('_', ' ')}")
            _save(folder, scores)
    if folder.report.is_file():
        _show_in_report(folder)
    return scores


def _open_files(args: argparse.Namespace, protocol: Protocol, stack: ExitStack) -> Files:
    """Open both files; of one whose samples are labelled in part, take that part. Without --val open one, as it is."""
    if not protocol.has_val:
        reader = stack.enter_context(Reader(args.train))
        return reader, reader
    train, val = (_labelled(stack.enter_context(Reader(path))) for path in (args.train, args.val))
    check_classes(train, val)
    return train, val


def _labelled(reader: Reader) -> Reader:
    part = reader.labelled()
    if len(part) < len(reader):
        _notify(f"{reader.path}: {len(part)} of {len(reader)} images have a label; the others are left out")
    return part


def _save(folder: RunFolder, scores: Scores) -> None:
    """Save the scores in the run folder, or a folder of runs/ for another encoder; where that fails, warn."""
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        save_scores(folder, scores)
    except OSError as error:
        _notify(f"warning: the score could not be saved in {folder.path}: {error}")


def _show_in_report(folder: RunFolder) -> None:
    """Show every score of the run in its report; where that fails, print a warning."""
    try:
        scores = [(summary(saved), _about(saved)) for saved in load_scores(folder)]
        if not evaluations.show(folder.report, scores):
            _notify(f"{folder.report} was written by an earlier version and has no place for scores")
    except (ConfigError, OSError) as error:
        _notify(f"warning: the score could not be shown in {folder.report}: {error}")


def _about(scores: Scores) -> str:
    """Return what a score was measured on."""
    part = f"{scores['fraction']:.3g} of the labels, " if "fraction" in scores else ""
    views = f"{scores['views']}, " if "views" in scores else ""
    step = f"step {scores['unfinished']['step']}, " if "unfinished" in scores else ""
    return f"{step}{part}{views}{Path(scores['val']).name}"


def _notify(text: str) -> None:
    print(f"fastbyol-eval: {text}", file=sys.stderr)


def summary(scores: Scores) -> str:
    """Summarise the scores, or the export, in one line."""
    if scores["protocol"] == "export":
        return export_run.summary(scores)
    trained = scores.get("trained", [*scores.values()][-1])  # a drawn encoder has the other's key
    found_of = {name: of for name, of in scores.items() if isinstance(of, dict) and name != "unfinished"}
    encoders = {name: of for name, of in found_of.items() if of.keys() & trained.keys()}
    parts = []
    for key, title in {**HEADLINES, **MEASURES}.items():
        unit = " %" if key in HEADLINES else ""
        of = [f"{found[key]:.2f}{unit} {TITLES.get(name, name)}" for name, found in encoders.items() if key in found]
        if of and not (key == "score" and trained["metric"] == "top1"):
            parts.append(f"{trained['metric'] if key == 'score' else title}: {', '.join(of)}")
    return f"{scores['protocol']} " + "; ".join(parts)
