"""fastbyol-eval: score the encoder of a finished run by a protocol, or export it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastbyol import atomic, formats, modelcard
from fastbyol.beton import BetonError, Reader
from fastbyol.commandline import BAD_INPUT, DONE, INTERRUPTED, fail
from fastbyol.config import Config, ConfigError, require
from fastbyol.device import choose
from fastbyol.encoder import ResNet, build
from fastbyol.evaluate import dense, finetune, knn, linear, masks, semi, splits, transfer
from fastbyol.evaluate.arguments import build_parser
from fastbyol.evaluate.features import Features, check, check_classes, labels_of, represent, spread
from fastbyol.evaluate.images import Lens
from fastbyol.export import load_encoder
from fastbyol.runfolder import RunFolder
from fastbyol.signals import StopSignal
from fastbyol.tables import command as tables

Scores = dict[str, Any]
Files = tuple[Reader, Reader]


def _open(folder: RunFolder) -> tuple[Config, ResNet]:
    """Read the configuration and the encoder of a run; raise ConfigError unless it has finished."""
    config = folder.read_config()
    if not folder.result.is_file():
        raise ConfigError(f"{folder.path} holds a run that has not finished; continue it with fastbyol-train --resume")
    return config, load_encoder(folder.encoder)


def score(args: argparse.Namespace) -> Scores:
    """Score the encoder of a run by the protocol asked for, beside the one it started from where that is cheap."""
    folder = RunFolder(args.run_dir)
    config, trained = _open(folder)
    device = choose(args.device)
    initial = build(config.recipe.encoder, seed=config.seed)
    encoders = {"trained": trained.to(device), "random_init": initial.to(device)}
    if args.protocol == "segment":
        return _segment(args, encoders, device)
    lens = Lens(config.recipe.eval_px, config.recipe.eval_margin, args.workers, device)
    with Reader(args.train) as train, Reader(args.val) as val:
        check_classes(train, val)
        scored = PROTOCOLS[args.protocol](args, encoders, (train, val), lens)
    return {"protocol": args.protocol, "run": str(folder.path), "train": args.train, "val": args.val, **scored}


def _features(encoder: ResNet, files: Files, lens: Lens, *, bank: int | None = None) -> tuple[Features, Features]:
    train, val = files
    both = (
        represent(encoder, train, spread(len(train), bank), lens),
        represent(encoder, val, spread(len(val), None), lens),
    )
    for features, reader in zip(both, files, strict=True):
        check(features, reader.path)
    return both


def _knn(args: argparse.Namespace, encoders: dict[str, ResNet], files: Files, lens: Lens) -> Scores:
    """Score every k and temperature; the headline is the first of each, so that the scored images choose nothing."""
    for k in args.k:
        knn.check(k, min(args.bank or len(files[0]), len(files[0])), temperature=args.temperature[0])
    scored = {}
    for name, encoder in encoders.items():
        bank, queries = _features(encoder, files, lens, bank=args.bank)
        cells = knn.sweep(bank, queries, args.k, args.temperature, device=lens.device)
        scored[name] = {
            "top1": cells[0].top1,
            "k": cells[0].k,
            "temperature": cells[0].temperature,
            "bank": len(bank.labels),
            "cells": [cell._asdict() for cell in cells],
        }
    return scored


def _linear(args: argparse.Namespace, encoders: dict[str, ResNet], files: Files, lens: Lens) -> Scores:
    settings = {"epochs": args.epochs, "seed": args.seed, "base_lrs": args.lrs}
    scored: Scores = {"views": "cached" if args.cached else "crop and flip"}
    for name, encoder in encoders.items():
        if name == "random_init" and args.skip_random_init:
            continue
        told = f"linear {name}"
        if args.cached:
            result = linear.score(*_features(encoder, files, lens), **settings, label=told)
        else:
            result = linear.score_augmented(encoder, files, lens, **settings, label=told)
        scored[name] = result._asdict()
    return scored


def _semi(args: argparse.Namespace, encoders: dict[str, ResNet], files: Files, lens: Lens) -> Scores:
    labels = labels_of(files[0])
    path = args.split or RunFolder(args.run_dir).path / "splits" / f"{args.fraction:g}-seed{args.seed}.json"
    if args.split is None and not path.exists():
        split = splits.balanced(labels, args.fraction, seed=args.seed)
        splits.store(path, split, labels, fraction=args.fraction, seed=args.seed)
    split = splits.read(path, labels)
    scored: Scores = {"split": str(path)}
    for name, encoder in (("trained", encoders["trained"]), ("supervised", encoders["random_init"])):
        if name == "supervised" and args.skip_supervised:
            continue
        scored[name] = semi.score(
            encoder,
            files,
            split,
            base_lrs=args.lrs,
            epochs=args.epochs,
            lens=lens,
            seed=args.seed,
            label=f"semi {name}",
        )
    return scored


def _transfer(args: argparse.Namespace, encoders: dict[str, ResNet], files: Files, lens: Lens) -> Scores:
    """Take whole centre squares: the protocol resizes the short side to the network's own."""
    whole = replace(lens, margin=1.0)
    return {
        name: transfer.score(
            *_features(encoder, files, whole),
            metric=args.metric,
            device=lens.device,
            seed=args.seed,
            label=f"transfer {name}",
        )
        for name, encoder in encoders.items()
    }


def _finetune(args: argparse.Namespace, encoders: dict[str, ResNet], files: Files, lens: Lens) -> Scores:
    return {
        name: finetune.score(
            encoder,
            files,
            grid=finetune.Grid(args.lrs, args.weight_decays, args.steps),
            metric=args.metric,
            lens=lens,
            seed=args.seed,
            label=f"finetune {name}",
        )
        for name, encoder in encoders.items()
        if name == "trained" or args.from_scratch
    }


def _segment(args: argparse.Namespace, encoders: dict[str, ResNet], device: str) -> Scores:
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
    batch = min(args.batch_size, len(train))
    plan = finetune.Plan(args.lr, args.weight_decay, args.steps, batch)
    results = {
        name: dense.score(
            encoder,
            (train, val),
            classes=int(known.max()) + 1,
            plan=plan,
            stride=args.stride,
            lens=Lens(args.crop_px, 1.0, device=device),
            seed=args.seed,
            label=f"segment {name}",
        )
        for name, encoder in encoders.items()
        if name == "trained" or args.from_scratch
    }
    places = {"train": str(args.images), "val": str(args.val_images or args.images)}
    return {"protocol": "segment", "run": str(args.run_dir), **places, "classes": len(known), **results}


Protocol = Callable[[argparse.Namespace, dict[str, ResNet], Files, Lens], Scores]
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
    formats.write(args.format, args.out, encoder, config.recipe.encoder, px=config.recipe.eval_px)
    card = args.out.with_name("model-card.md")
    written = modelcard.text(
        config,
        json.loads(folder.result.read_text()),
        modelcard.kept_scores(folder),
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


def keep(folder: Path, scores: Scores) -> None:
    """Keep scores in the run folder for its model card, the latest of each protocol."""
    name = f"{scores['protocol']}.json"
    (folder / "scores").mkdir(exist_ok=True)
    atomic.write(folder / "scores" / name, json.dumps(scores, indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run fastbyol-eval; return the exit status: 0 done, 2 bad usage or input, 75 interrupted."""
    args = build_parser().parse_args(argv)
    try:
        with StopSignal().heard():
            if args.protocol == "table":
                return tables.main(args)
            scores = export(args) if args.protocol == "export" else score(args)
    except KeyboardInterrupt:
        print("fastbyol-eval: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ConfigError, BetonError, OSError) as error:
        return fail("fastbyol-eval", error, status=BAD_INPUT)
    print(json.dumps(scores) if args.json else sentence(scores))
    if args.protocol != "export":
        try:
            keep(args.run_dir, scores)
        except OSError as error:
            print(f"fastbyol-eval: warning: the score is not kept beside the run: {error}", file=sys.stderr)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
