"""fastbyol-eval: score the encoder of a finished run by a protocol, or export it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import product

from fastbyol import atomic, formats, modelcard, threads
from fastbyol.beton import BetonError, Reader
from fastbyol.cgroups import available_cores
from fastbyol.commandline import BAD_INPUT, DONE, INTERRUPTED, fail
from fastbyol.config import Config, ConfigError, require
from fastbyol.device import choose_device
from fastbyol.encoder import ResNet, build
from fastbyol.evaluate import dense, finetune, knn, linear, masks, semi, splits, transfer
from fastbyol.evaluate.arguments import build_parser
from fastbyol.evaluate.features import Features, check, check_classes, labels_of, represent, spread
from fastbyol.evaluate.images import Lens
from fastbyol.export import load_encoder
from fastbyol.jpeg import require_pillow
from fastbyol.loaders import default_workers
from fastbyol.runfolder import RunFolder
from fastbyol.scores import Scores, load_scores, save_scores
from fastbyol.signals import StopSignal
from fastbyol.tables import command as tables
from fastbyol.threads import ThreadTuner

Files = tuple[Reader, Reader]
Job = Callable[[ResNet, str], Scores]  # of an encoder and a name for its progress bars


def _open(folder: RunFolder) -> tuple[Config, ResNet]:
    """Read the configuration and the encoder of a run; raise ConfigError unless it has finished."""
    config = folder.read_config()
    if not folder.result.is_file():
        raise ConfigError(f"{folder.path} holds a run that has not finished; continue it with fastbyol-train --resume")
    return config, load_encoder(folder.encoder)


def score(args: argparse.Namespace) -> Scores:
    """Score the encoder of a run by the protocol asked for, beside the one it started from; keep each when it is there.

    The second encoder is left out where the command line says so, and named "supervised" where it learns alone.
    """
    folder = RunFolder(args.run_dir)
    config, trained = _open(folder)
    device, asked = choose_device(args.device), vars(args)
    encoders = {"trained": trained}
    if asked.get("from_scratch", True) and not (asked.get("skip_random_init") or asked.get("skip_supervised")):
        second = "supervised" if args.protocol == "semi" else "random_init"
        encoders[second] = build(config.recipe.encoder, seed=config.seed)
    chosen = threads.make_tuner(
        args.threads, device, notify=lambda text: print(f"fastbyol-eval: {text}", file=sys.stderr)
    )
    with ExitStack() as stack:
        if args.protocol == "segment":
            facts, job = _segment(args, device, chosen)
        else:
            train, val = (stack.enter_context(Reader(path)) for path in (args.train, args.val))
            check_classes(train, val)
            px, margin = config.recipe.eval_px, config.recipe.eval_margin
            workers = args.workers or default_workers(device, cores=available_cores())
            lens = Lens(px, margin, workers, device, threads=chosen)
            facts, job = PROTOCOLS[args.protocol](args, (train, val), lens)
            facts = {"train": args.train, "val": args.val, **facts}
        scores: Scores = {"protocol": args.protocol, "run": str(folder.path), **facts}
        for name, encoder in encoders.items():
            scores[name] = job(encoder.to(device), f"{args.protocol} {name.replace('_', ' ')}")
            try:
                save_scores(folder, scores)
            except OSError as error:
                print(f"fastbyol-eval: warning: the score is not kept beside the run: {error}", file=sys.stderr)
    return scores


def _features(encoder: ResNet, files: Files, lens: Lens, *, bank: int | None = None) -> tuple[Features, Features]:
    train, val = files
    both = (
        represent(encoder, train, spread(len(train), bank), lens),
        represent(encoder, val, spread(len(val), None), lens),
    )
    for features, reader in zip(both, files, strict=True):
        check(features, reader.path)
    return both


def _knn(args: argparse.Namespace, files: Files, lens: Lens) -> tuple[Scores, Job]:
    """Score every k and temperature; the headline is the first of each, so that the scored images choose nothing."""
    for k, temperature in product(args.k, args.temperature):
        knn.check(k, min(args.bank or len(files[0]), len(files[0])), temperature=temperature)

    def job(encoder: ResNet, _: str) -> Scores:
        bank, queries = _features(encoder, files, lens, bank=args.bank)
        cells = knn.sweep(bank, queries, args.k, args.temperature, device=lens.device)
        headline = {"top1": cells[0].top1, "k": cells[0].k, "temperature": cells[0].temperature}
        return {**headline, "bank": len(bank.labels), "cells": [cell._asdict() for cell in cells]}

    return {}, job


def _linear(args: argparse.Namespace, files: Files, lens: Lens) -> tuple[Scores, Job]:
    settings = {"epochs": args.epochs, "seed": args.seed, "base_lrs": args.lrs}

    def job(encoder: ResNet, label: str) -> Scores:
        if args.cached:
            result = linear.score(
                *_features(encoder, files, lens), **settings, device=lens.device, threads=lens.threads, label=label
            )
        else:
            result = linear.score_augmented(encoder, files, lens, **settings, label=label)
        return result._asdict()

    return {"views": "cached" if args.cached else "crop and flip", "epochs": args.epochs, "seed": args.seed}, job


def _semi(args: argparse.Namespace, files: Files, lens: Lens) -> tuple[Scores, Job]:
    labels = labels_of(files[0])
    name = f"{args.fraction:g}-seed{args.seed}-{splits.fingerprint(labels)[:8]}.json"
    path = args.split or RunFolder(args.run_dir).path / "splits" / name
    if args.split is None and not path.exists():
        split = splits.balanced(labels, args.fraction, seed=args.seed)
        splits.store(path, split, labels, fraction=args.fraction, seed=args.seed)
    split = splits.read(path, labels)

    def job(encoder: ResNet, label: str) -> Scores:
        return semi.score(
            encoder, files, split, base_lrs=args.lrs, epochs=args.epochs, lens=lens, seed=args.seed, label=label
        )

    return {"split": str(path), "fraction": split.learn.size / len(labels)}, job


def _transfer(args: argparse.Namespace, files: Files, lens: Lens) -> tuple[Scores, Job]:
    """Take whole centre squares: the protocol resizes the short side to the network's own."""
    whole = replace(lens, margin=1.0)

    def job(encoder: ResNet, label: str) -> Scores:
        train, val = _features(encoder, files, whole)
        how = {"metric": args.metric, "device": lens.device, "threads": lens.threads}
        return transfer.score(train, val, **how, seed=args.seed, label=label)

    return {}, job


def _finetune(args: argparse.Namespace, files: Files, lens: Lens) -> tuple[Scores, Job]:
    grid = finetune.Grid(args.lrs, args.weight_decays, args.steps)

    def job(encoder: ResNet, label: str) -> Scores:
        return finetune.score(encoder, files, grid=grid, metric=args.metric, lens=lens, seed=args.seed, label=label)

    return {}, job


def _segment(args: argparse.Namespace, device: str, chosen: ThreadTuner) -> tuple[Scores, Job]:
    require(
        (args.val_images is None) == (args.val_masks is None),
        "one of --val-images and --val-masks; give both, or neither to score on a fifth of --images",
    )
    found = masks.pairs(args.images, args.masks)
    if args.val_images is None:
        train, val = dense.hold_out(found, seed=args.seed)
    else:
        train, val = found, masks.pairs(args.val_images, args.val_masks)
    known, scored = masks.classes_of(train), masks.classes_of(val)
    absent = sorted(set(scored.tolist()) - set(known.tolist()))
    require(not absent, f"the masks to score on hold classes {absent[:5]} that those to learn from do not; add images")
    plan = finetune.Plan(args.lr, args.weight_decay, args.steps, min(args.batch_size, len(train)))
    lens, classes = Lens(args.crop_px, 1.0, device=device, threads=chosen), int(known.max()) + 1

    def job(encoder: ResNet, label: str) -> Scores:
        return dense.score(
            encoder,
            (train, val),
            classes=classes,
            plan=plan,
            stride=args.stride,
            lens=lens,
            seed=args.seed,
            label=label,
        )

    places = {"train": str(args.images), "val": str(args.val_images or args.images)}
    return {**places, "classes": len(known)}, job


Protocol = Callable[[argparse.Namespace, Files, Lens], tuple[Scores, Job]]  # facts to keep beside, and what scores
PROTOCOLS: dict[str, Protocol] = {
    "knn": _knn,
    "linear": _linear,
    "semi": _semi,
    "transfer": _transfer,
    "finetune": _finetune,
}


def export(args: argparse.Namespace) -> Scores:
    """Write the encoder of a run in another format, and its model card beside it."""
    folder = RunFolder(args.run_dir)
    config, encoder = _open(folder)
    own = (folder.path, folder.checkpoints, folder.scores, folder.tensorboard, folder.profile)
    require(
        args.out.resolve().parent not in [path.resolve() for path in own],
        f"{args.out} lies among the files of the run, which it could replace; give a folder of its own",
    )
    formats.write(args.format, args.out, encoder, config.recipe.encoder, px=config.recipe.eval_px)
    card = args.out.with_name("model-card.md")
    written = modelcard.render(
        config,
        json.loads(folder.result.read_text()),
        load_scores(folder),
        kind=args.format,
        name=args.out.name,
        features=encoder.features,
    )
    atomic.write(card, written)
    return {"protocol": "export", "run": str(folder.path), "file": str(args.out), "model_card": str(card)}


def sentence(scores: Scores) -> str:
    """Say the outcome in one line."""
    if scores["protocol"] == "export":
        return f"wrote {scores['file']} and {scores['model_card']}"
    told = {"trained": "trained", "random_init": "random init", "supervised": "supervised from scratch"}
    parts = []
    for key, title in (("score", "score"), ("miou", "mIoU"), ("top1", "top-1"), ("top5", "top-5")):
        of = [f"{scores[name][key]:.2f} % {text}" for name, text in told.items() if key in scores.get(name, {})]
        if of and not (key == "score" and scores["trained"]["metric"] == "top1"):
            parts.append(f"{scores['trained']['metric'] if key == 'score' else title}: {', '.join(of)}")
    return f"{scores['protocol']} " + "; ".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Run fastbyol-eval; return the exit status: 0 done, 2 bad usage or input, 75 interrupted."""
    args = build_parser().parse_args(argv)
    try:
        with StopSignal().catch():
            require_pillow()
            if args.protocol == "table":
                return tables.main(args)
            scores = export(args) if args.protocol == "export" else score(args)
    except KeyboardInterrupt:
        print("fastbyol-eval: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ConfigError, BetonError, OSError) as error:
        return fail("fastbyol-eval", error, status=BAD_INPUT)
    print(json.dumps(scores) if args.json else sentence(scores))
    return DONE


if __name__ == "__main__":
    sys.exit(main())
