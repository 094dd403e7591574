"""The command fastbyol-eval, which scores the encoder of a finished run by a protocol or exports it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import product

from fastbyol.beton import BetonError, Reader
from fastbyol.cli import table as tables
from fastbyol.cli.arguments import build_parser
from fastbyol.config import Config
from fastbyol.errors import ConfigError, require
from fastbyol.evaluate import finetune, knn, linear, linear_transfer, masks, segmentation, semi_supervised, splits
from fastbyol.evaluate.features import Features, check_classes, check_features, evenly_spaced, labels_of, represent
from fastbyol.evaluate.images import InputSettings
from fastbyol.export import formats, load_encoder, model_card
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
from fastbyol.system.threads import ThreadTuner

Files = tuple[Reader, Reader]
ScoreEncoder = Callable[[Encoder, str], Scores]  # arguments: the encoder, a label for the progress bars


def _open(folder: RunFolder) -> tuple[Config, Encoder]:
    """Read the configuration and the encoder of a run; raise ConfigError if it has not finished."""
    config = folder.read_config()
    if not folder.result.is_file():
        raise ConfigError(f"the run in {folder.path} has not finished; continue it with fastbyol-train --resume")
    return config, load_encoder(folder.encoder, trust=True)  # as the run's own configuration names it


def score(args: argparse.Namespace) -> Scores:
    """Score a run's trained encoder and the encoder it started from, and save each score as soon as it is known.

    The command line may leave the second encoder out. In the protocol "semi" it is called "supervised", because it
    learns from the labels alone.
    """
    folder = RunFolder(args.run_dir)
    config, trained = _open(folder)
    device, options = choose_device(args.device), vars(args)
    encoders = {"trained": trained}
    if options.get("from_scratch", True) and not (options.get("skip_random_init") or options.get("skip_supervised")):
        second = "supervised" if args.protocol == "semi" else "random_init"
        encoders[second] = build_encoder(config.recipe.encoder, seed=config.seed)
    torch_threads = threads.make_tuner(
        args.threads, device, notify=lambda text: print(f"fastbyol-eval: {text}", file=sys.stderr)
    )
    with ExitStack() as stack:
        if args.protocol == "segment":
            facts, score_encoder = _segment(args, device, torch_threads)
        else:
            train, val = (stack.enter_context(Reader(path)) for path in (args.train, args.val))
            check_classes(train, val)
            px, margin = config.recipe.eval_px, config.recipe.eval_margin
            workers = args.workers or default_workers(device, cores=available_cores())
            inputs = InputSettings(px, margin, workers, device, threads=torch_threads)
            facts, score_encoder = PROTOCOLS[args.protocol](args, (train, val), inputs)
            facts = {"train": args.train, "val": args.val, **facts}
        scores: Scores = {"protocol": args.protocol, "run": str(folder.path), **facts}
        for name, encoder in encoders.items():
            scores[name] = score_encoder(encoder.to(device), f"{args.protocol} {name.replace('_', ' ')}")
            try:
                save_scores(folder, scores)
            except OSError as error:
                print(
                    f"fastbyol-eval: warning: the score could not be saved in the run folder: {error}", file=sys.stderr
                )
    return scores


def _features(
    encoder: Encoder, files: Files, inputs: InputSettings, *, bank: int | None = None
) -> tuple[Features, Features]:
    train, val = files
    both = (
        represent(encoder, train, evenly_spaced(len(train), bank), inputs),
        represent(encoder, val, evenly_spaced(len(val), None), inputs),
    )
    for features, reader in zip(both, files, strict=True):
        check_features(features, reader.path)
    return both


def _knn(args: argparse.Namespace, files: Files, inputs: InputSettings) -> tuple[Scores, ScoreEncoder]:
    """Score every k and temperature.

    The headline is the first of each, so that nothing is chosen on the images that are scored.
    """
    for k, temperature in product(args.k, args.temperature):
        knn.check_settings(k, min(args.bank or len(files[0]), len(files[0])), temperature=temperature)

    def score_encoder(encoder: Encoder, _: str) -> Scores:
        bank, queries = _features(encoder, files, inputs, bank=args.bank)
        cells = knn.sweep(bank, queries, args.k, args.temperature, device=inputs.device)
        headline = {"top1": cells[0].top1, "k": cells[0].k, "temperature": cells[0].temperature}
        return {**headline, "bank": len(bank.labels), "cells": [cell._asdict() for cell in cells]}

    return {}, score_encoder


def _linear(args: argparse.Namespace, files: Files, inputs: InputSettings) -> tuple[Scores, ScoreEncoder]:
    settings = {"epochs": args.epochs, "seed": args.seed, "base_lrs": args.lrs}

    def score_encoder(encoder: Encoder, label: str) -> Scores:
        if args.cached:
            result = linear.score(
                *_features(encoder, files, inputs),
                **settings,
                device=inputs.device,
                threads=inputs.threads,
                label=label,
            )
        else:
            result = linear.score_augmented(encoder, files, inputs, **settings, label=label)
        return result._asdict()

    views = "cached" if args.cached else "crop and flip"
    return {"views": views, "epochs": args.epochs, "seed": args.seed}, score_encoder


def _semi(args: argparse.Namespace, files: Files, inputs: InputSettings) -> tuple[Scores, ScoreEncoder]:
    labels = labels_of(files[0])
    name = f"{args.fraction:g}-seed{args.seed}-{splits.fingerprint(labels)[:8]}.json"
    path = args.split or RunFolder(args.run_dir).splits / name
    if args.split is None and not path.exists():
        split = splits.balanced_split(labels, args.fraction, seed=args.seed)
        splits.save(path, split, labels, fraction=args.fraction, seed=args.seed)
    split = splits.load(path, labels)

    def score_encoder(encoder: Encoder, label: str) -> Scores:
        return semi_supervised.score(
            encoder, files, split, base_lrs=args.lrs, epochs=args.epochs, inputs=inputs, seed=args.seed, label=label
        )

    return {"split": str(path), "fraction": split.learn.size / len(labels)}, score_encoder


def _transfer(args: argparse.Namespace, files: Files, inputs: InputSettings) -> tuple[Scores, ScoreEncoder]:
    """Use whole centre squares: the protocol resizes the short side to the network's input size."""
    whole = replace(inputs, margin=1.0)

    def score_encoder(encoder: Encoder, label: str) -> Scores:
        train, val = _features(encoder, files, whole)
        settings = {"metric": args.metric, "device": inputs.device, "threads": inputs.threads}
        return linear_transfer.score(train, val, **settings, seed=args.seed, label=label)

    return {}, score_encoder


def _finetune(args: argparse.Namespace, files: Files, inputs: InputSettings) -> tuple[Scores, ScoreEncoder]:
    grid = finetune.Grid(args.lrs, args.weight_decays, args.steps)

    def score_encoder(encoder: Encoder, label: str) -> Scores:
        return finetune.score(encoder, files, grid=grid, metric=args.metric, inputs=inputs, seed=args.seed, label=label)

    return {}, score_encoder


def _segment(args: argparse.Namespace, device: str, torch_threads: ThreadTuner) -> tuple[Scores, ScoreEncoder]:
    require(
        (args.val_images is None) == (args.val_masks is None),
        "only one of --val-images and --val-masks is given; give both, or neither to score on a fifth of --images",
    )
    found = masks.find_pairs(args.images, args.masks)
    if args.val_images is None:
        train, val = segmentation.hold_out(found, seed=args.seed)
    else:
        train, val = found, masks.find_pairs(args.val_images, args.val_masks)
    known, scored = masks.find_classes(train), masks.find_classes(val)
    absent = sorted(set(scored.tolist()) - set(known.tolist()))
    require(
        not absent,
        f"the validation masks hold classes {absent[:5]} that no training mask holds; add training images of them",
    )
    hparams = finetune.HParams(args.lr, args.weight_decay, args.steps, min(args.batch_size, len(train)))
    inputs, classes = InputSettings(args.crop_px, 1.0, device=device, threads=torch_threads), int(known.max()) + 1

    def score_encoder(encoder: Encoder, label: str) -> Scores:
        return segmentation.score(
            encoder,
            (train, val),
            classes=classes,
            hparams=hparams,
            stride=args.stride,
            inputs=inputs,
            seed=args.seed,
            label=label,
        )

    places = {"train": str(args.images), "val": str(args.val_images or args.images)}
    return {**places, "classes": len(known)}, score_encoder


# Returns facts to save beside the scores, and the function that scores an encoder.
Protocol = Callable[[argparse.Namespace, Files, InputSettings], tuple[Scores, ScoreEncoder]]
PROTOCOLS: dict[str, Protocol] = {
    "knn": _knn,
    "linear": _linear,
    "semi": _semi,
    "transfer": _transfer,
    "finetune": _finetune,
}


def export(args: argparse.Namespace) -> Scores:
    """Write the encoder of a run in another format, with a model card beside it."""
    folder = RunFolder(args.run_dir)
    config, encoder = _open(folder)
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
    titles = {"trained": "trained", "random_init": "random init", "supervised": "supervised from scratch"}
    parts = []
    for key, title in (("score", "score"), ("miou", "mIoU"), ("top1", "top-1"), ("top5", "top-5")):
        of = [f"{scores[name][key]:.2f} % {text}" for name, text in titles.items() if key in scores.get(name, {})]
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
    print(json.dumps(scores) if args.json else summary(scores))
    return DONE


if __name__ == "__main__":
    sys.exit(main())
