"""What fastbyol-eval does with its flags: scores of a run's encoder by a protocol, or an export of it."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack

from fastbyol.beton import BetonError, Reader
from fastbyol.cli import table as tables
from fastbyol.cli.cache import Cache, folder_of
from fastbyol.config import Config
from fastbyol.errors import ConfigError, require
from fastbyol.evaluate.features import check_classes
from fastbyol.evaluate.images import InputSettings
from fastbyol.evaluate.protocol import Files, Protocol
from fastbyol.export import formats, load_fused, model_card
from fastbyol.jpeg import require_pillow
from fastbyol.loaders import default_workers
from fastbyol.parts import Encoder, build_encoder
from fastbyol.storage import files
from fastbyol.storage.run_folder import RunFolder
from fastbyol.storage.scores import Scores, load_scores, save_scores
from fastbyol.system import threads
from fastbyol.system.command_line import BAD_INPUT, DONE, INTERRUPTED, fail
from fastbyol.system.device import choose_device
from fastbyol.system.limits import available_cores
from fastbyol.system.signals import StopSignal

TITLES = {"random_init": "random init", "supervised": "supervised from scratch"}  # keys of encoders, in a summary
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
        with StopSignal().catch():
            require_pillow()
            if args.protocol == "table":
                return tables.main(args)
            scores = export(args) if protocol is None else score(args, protocol)
    except KeyboardInterrupt:
        print("fastbyol-eval: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ConfigError, BetonError, OSError) as error:
        return fail("fastbyol-eval", error, status=BAD_INPUT)
    print(json.dumps(scores) if args.json else summary(scores))
    return DONE


def open_run(folder: RunFolder) -> tuple[Config, Encoder]:
    """Read the configuration and the encoder of a run; raise ConfigError if it has not finished."""
    config = folder.read_config()
    if not folder.result.is_file():
        raise ConfigError(f"the run in {folder.path} has not finished; continue it with fastbyol-train --resume")
    return config, load_fused(folder.encoder, trust=True)  # the run's own configuration names it


def score(args: argparse.Namespace, protocol: Protocol) -> Scores:
    """Score a run's trained encoder and the protocol's second one, and save each score as soon as it is known."""
    folder = RunFolder(args.run_dir)
    config, trained = open_run(folder)
    device = choose_device(args.device)
    encoders = {"trained": trained}
    if protocol.scores_baseline(args):
        encoders[protocol.baseline] = build_encoder(config.recipe.encoder, seed=config.seed)
    workers = (args.workers if protocol.has_files else None) or default_workers(device, cores=available_cores())
    torch_threads = threads.make_tuner(args.threads, device, notify=_notify)
    on_error = args.on_error if protocol.has_files else "fail"
    recipe = config.recipe
    inputs = InputSettings(recipe.eval_px, recipe.eval_margin, workers, device, on_error, threads=torch_threads)
    if protocol.has_files:
        cache = Cache(folder_of(folder.path, args.cache), tuple(args.prep), command="fastbyol-eval")
        args.train, args.val = cache.pair(args.train, args.val if protocol.has_val else args.train)
    with ExitStack() as stack:
        data = _open_files(args, protocol, stack) if protocol.has_files else None
        facts, job = protocol.prepare(args, data, inputs)
        places = {"train": args.train, "val": args.val} if protocol.has_files else {}
        scores: Scores = {"protocol": args.protocol, "run": str(folder.path), **places, **facts}
        for name, encoder in encoders.items():
            scores[name] = job(encoder.to(device), f"{args.protocol} {name.replace('_', ' ')}")
            _save(folder, scores)
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
    """Save the scores in the run folder; where that fails, print a warning."""
    try:
        save_scores(folder, scores)
    except OSError as error:
        _notify(f"warning: the score could not be saved in the run folder: {error}")


def _notify(text: str) -> None:
    print(f"fastbyol-eval: {text}", file=sys.stderr)


def export(args: argparse.Namespace) -> Scores:
    """Write the encoder of a run in another format, with a model card beside it."""
    folder = RunFolder(args.run_dir)
    config, encoder = open_run(folder)
    own = (folder.path, folder.checkpoints, folder.scores, folder.tensorboard, folder.profile)
    require(
        args.out.resolve().parent not in [path.resolve() for path in own],
        f"{args.out} lies in the run folder and could replace a file of the run; give a path in another folder",
    )
    formats.write(args.format, args.out, encoder, config.recipe.encoder, px=config.recipe.eval_px)
    card = args.out.with_name("model-card.md")
    written = model_card.render(
        config,
        json.loads(folder.result.read_text()),
        load_scores(folder),
        kind=args.format,
        name=args.out.name,
        features=encoder.features,
    )
    files.write(card, written)
    return {"protocol": "export", "run": str(folder.path), "file": str(args.out), "model_card": str(card)}


def summary(scores: Scores) -> str:
    """Summarise the scores, or the export, in one line."""
    if scores["protocol"] == "export":
        return f"wrote {scores['file']} and {scores['model_card']}"
    trained = scores["trained"]
    encoders = {name: of for name, of in scores.items() if isinstance(of, dict) and of.keys() & trained.keys()}
    parts = []
    for key, title in {**HEADLINES, **MEASURES}.items():
        unit = " %" if key in HEADLINES else ""
        of = [f"{found[key]:.2f}{unit} {TITLES.get(name, name)}" for name, found in encoders.items() if key in found]
        if of and not (key == "score" and trained["metric"] == "top1"):
            parts.append(f"{trained['metric'] if key == 'score' else title}: {', '.join(of)}")
    return f"{scores['protocol']} " + "; ".join(parts)
