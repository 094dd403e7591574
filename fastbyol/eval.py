"""fastbyol-eval: score the encoder of a finished run, beside the one it started from."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastbyol.beton import BetonError, Reader
from fastbyol.commandline import BAD_INPUT, DONE, INTERRUPTED, Parser, fail, seed, whole_number
from fastbyol.config import Config, ConfigError
from fastbyol.device import choose
from fastbyol.encoder import ResNet, build
from fastbyol.evaluate import knn, linear
from fastbyol.evaluate.features import Features, check_classes, extract
from fastbyol.export import load_encoder
from fastbyol.runfolder import RunFolder
from fastbyol.tables import command as tables


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line (a contract: names and meanings stay)."""
    parser = Parser(prog="fastbyol-eval", description="Score the encoder of a run.")
    commands = parser.add_subparsers(dest="protocol", metavar="knn|linear|table", required=True)
    for name, told in (
        ("knn", "weighted k-nearest neighbours, cosine"),
        ("linear", "a linear classifier on cached features, learning rate chosen on held-out training images"),
    ):
        command = commands.add_parser(name, help=told, description=told)
        command.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a folder in which fastbyol-train finished")
        command.add_argument("--train", required=True, metavar="F.beton", help="labelled images to learn from")
        command.add_argument("--val", required=True, metavar="F.beton", help="labelled images to score on")
        command.add_argument("--json", action="store_true", help="print one JSON object")
        command.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda where there is one")
        command.add_argument("--workers", type=whole_number, default=2, metavar="N", help="decoding threads")
        if name == "knn":
            command.add_argument("--k", type=int, default=knn.K, metavar="N", help="neighbours that vote")
            command.add_argument("--temperature", type=float, default=knn.TEMPERATURE, metavar="X")
            command.add_argument(
                "--bank", type=whole_number, metavar="N", help="training images to vote (default: all)"
            )
        else:
            command.add_argument("--epochs", type=whole_number, default=linear.EPOCHS, metavar="N")
            command.add_argument("--seed", type=seed, default=0, metavar="N")
    told = "an ablation table of the paper: trains every cell, and writes the scores beside the paper's"
    tables.add_arguments(commands.add_parser("table", help=told, description=told))
    return parser


def score(args: argparse.Namespace) -> dict[str, Any]:
    """Score the trained and the random-init encoder of a run by the protocol asked for."""
    folder = RunFolder(args.run_dir)
    config, device = folder.read_config(), choose(args.device)
    if not folder.result.is_file():
        raise ConfigError(f"{folder.path} holds a run that has not finished; continue it with fastbyol-train --resume")
    trained = load_encoder(folder.encoder)
    initial = build(config.recipe.encoder, seed=config.seed)
    with Reader(args.train) as train, Reader(args.val) as val:
        check_classes(train, val)
        scores = {
            name: _score_one(args, config, encoder.to(device), train, val)
            for name, encoder in (("trained", trained), ("random_init", initial))
        }
    settings = {"protocol": args.protocol, "run": str(folder.path), "train": args.train, "val": args.val}
    return {**settings, **scores}


def _score_one(args: argparse.Namespace, config: Config, encoder: ResNet, train: Reader, val: Reader) -> dict[str, Any]:
    recipe = config.recipe

    def features(reader: Reader, limit: int | None) -> Features:
        return extract(
            encoder, reader, eval_px=recipe.eval_px, margin=recipe.eval_margin, workers=args.workers, limit=limit
        )

    if args.protocol == "knn":
        knn.check(args.k, min(args.bank or len(train), len(train)), temperature=args.temperature)
        bank, queries = features(train, args.bank), features(val, None)
        top1 = knn.top1(bank, queries, k=args.k, temperature=args.temperature)
        return {"top1": top1, "k": args.k, "temperature": args.temperature, "bank": len(bank.labels)}
    return linear.score(features(train, None), features(val, None), epochs=args.epochs, seed=args.seed)._asdict()


def _sentence(scores: dict[str, Any]) -> str:
    trained, initial = scores["trained"], scores["random_init"]
    text = f"{scores['protocol']} top-1: {trained['top1']:.2f} % trained, {initial['top1']:.2f} % random init"
    if "top5" in trained:
        text += f"; top-5: {trained['top5']:.2f} % trained, {initial['top5']:.2f} % random init"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Run fastbyol-eval; return the exit status: 0 scored, 2 bad usage or input, 75 interrupted."""
    args = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends the scoring as Ctrl-C does
    try:
        if args.protocol == "table":
            return tables.main(args)
        scores = score(args)
    except KeyboardInterrupt:
        print("fastbyol-eval: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ConfigError, BetonError, OSError) as error:
        return fail("fastbyol-eval", error, status=BAD_INPUT)
    print(json.dumps(scores) if args.json else _sentence(scores))
    return DONE


if __name__ == "__main__":
    sys.exit(main())
