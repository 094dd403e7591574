"""The command-line parser of fastbyol-eval, with one subcommand per protocol."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastbyol.cli import table as tables
from fastbyol.evaluate import finetune, knn, linear, segmentation, semi_supervised
from fastbyol.evaluate.metrics import METRICS
from fastbyol.export.formats import FORMATS
from fastbyol.system.command_line import (
    THREADS,
    WORKERS,
    Parser,
    nonnegative_number,
    positive_number,
    proper_fraction,
    seed,
    whole_number,
)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser; its names and meanings are a contract and do not change."""
    parser = Parser(prog="fastbyol-eval", description="Score the encoder of a run, or export it.")
    commands = parser.add_subparsers(dest="protocol", metavar="PROTOCOL", required=True)

    def command(name: str, help_text: str) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = commands.add_parser(name, help=help_text, description=help_text)
        added.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a folder in which fastbyol-train finished")
        added.add_argument("--json", action="store_true", help="print one JSON object")
        return added

    _knn(command("knn", "nearest neighbours by cosine, weighted and plain"))
    _linear(command("linear", "a linear classifier, its learning rate chosen on held-out training images"))
    _semi(command("semi", "fine-tuning on a class-balanced part of the labels, beside the same network from scratch"))
    _transfer(command("transfer", "logistic regression by L-BFGS, its penalty chosen on held-out training images"))
    _finetune(command("finetune", "fine-tuning on all labels, rate and decay chosen on held-out training images"))
    _segment(command("segment", "semantic segmentation by a convolutional head, from images and masks"))
    _export(command("export", "the encoder in a file for fastbyol, torchvision, timm, detectron2 or ONNX"))
    help_text = "an ablation table of the paper: trains every cell, and writes the scores beside the paper's"
    tables.add_arguments(commands.add_parser("table", help=help_text, description=help_text))
    return parser


def _files(command: argparse.ArgumentParser) -> None:
    command.add_argument("--train", required=True, metavar="F.beton", help="labelled images to learn from")
    command.add_argument("--val", required=True, metavar="F.beton", help="labelled images to score on")
    command.add_argument("--workers", type=whole_number, metavar="N", help=WORKERS)
    _device(command)


def _device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--threads", type=whole_number, metavar="N", help=THREADS)
    command.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda where there is one")


def _seed(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seed", type=seed, default=0, metavar="N")


def _metric(command: argparse.ArgumentParser) -> None:
    command.add_argument("--metric", choices=list(METRICS), default="top1", help="what chooses, and is reported beside")


def _from_scratch(command: argparse.ArgumentParser) -> None:
    command.add_argument("--from-scratch", action="store_true", help="tune from random weights, too")


def _knn(command: argparse.ArgumentParser) -> None:
    _files(command)
    help_text = "neighbours that vote; the first is the headline, all are scored"
    command.add_argument("--k", type=int, nargs="+", default=[knn.K], metavar="N", help=help_text)
    command.add_argument("--temperature", type=float, nargs="+", default=[knn.TEMPERATURE], metavar="X")
    command.add_argument("--bank", type=whole_number, metavar="N", help="training images to vote (default: all)")


def _linear(command: argparse.ArgumentParser) -> None:
    _files(command)
    _seed(command)
    help_text = "represent each image once, by its centre: fast; the paper draws a crop and flip each epoch"
    command.add_argument("--cached", action="store_true", help=help_text)
    command.add_argument("--epochs", type=whole_number, default=linear.EPOCHS, metavar="N")
    help_text = "learning rates per 256 images, all trained at once"
    command.add_argument(
        "--lrs", type=positive_number, nargs="+", default=list(linear.BASE_LRS), metavar="X", help=help_text
    )
    command.add_argument("--skip-random-init", action="store_true", help="score the trained encoder alone")


def _semi(command: argparse.ArgumentParser) -> None:
    _files(command)
    _seed(command)
    command.add_argument(
        "--fraction", type=proper_fraction, default=0.01, metavar="X", help="of the training labels (0.01)"
    )
    help_text = "a stored split (default: that of this fraction and seed in RUN_DIR/splits, made if it is not there)"
    command.add_argument("--split", type=Path, metavar="F.json", help=help_text)
    help_text = "learning rates per 256 images"
    command.add_argument(
        "--lrs", type=positive_number, nargs="+", default=list(semi_supervised.BASE_LRS), metavar="X", help=help_text
    )
    command.add_argument("--epochs", type=whole_number, nargs="+", default=list(semi_supervised.EPOCHS), metavar="N")
    command.add_argument("--skip-supervised", action="store_true", help="leave out the network from scratch")


def _transfer(command: argparse.ArgumentParser) -> None:
    _files(command)
    _seed(command)
    _metric(command)


def _finetune(command: argparse.ArgumentParser) -> None:
    _files(command)
    _seed(command)
    _metric(command)
    _from_scratch(command)
    command.add_argument("--steps", type=whole_number, default=finetune.STEPS, metavar="N")
    command.add_argument(
        "--lrs", type=positive_number, nargs="+", default=list(finetune.LRS), metavar="X", help="learning rates"
    )
    command.add_argument(
        "--weight-decays",
        type=nonnegative_number,
        nargs="+",
        default=list(finetune.WEIGHT_DECAYS),
        metavar="X",
        help="each is divided by the learning rate",
    )


def _segment(command: argparse.ArgumentParser) -> None:
    _device(command)
    _seed(command)
    _from_scratch(command)
    help_text = "PNG masks of class numbers, named as their images; 255 is ignored"
    command.add_argument("--images", type=Path, required=True, metavar="DIR", help="images to learn from")
    command.add_argument("--masks", type=Path, required=True, metavar="DIR", help=help_text)
    command.add_argument("--val-images", type=Path, metavar="DIR", help="images to score on (default: a fifth)")
    command.add_argument("--val-masks", type=Path, metavar="DIR")
    command.add_argument(
        "--stride", type=whole_number, default=segmentation.STRIDE, metavar="N", help="of the last map (16)"
    )
    command.add_argument("--crop-px", type=whole_number, default=segmentation.CROP_PX, metavar="N")
    command.add_argument("--steps", type=whole_number, default=segmentation.STEPS, metavar="N")
    command.add_argument("--batch-size", type=whole_number, default=segmentation.BATCH, metavar="N")
    command.add_argument("--lr", type=positive_number, default=segmentation.LR, metavar="X")
    command.add_argument("--weight-decay", type=nonnegative_number, default=segmentation.WEIGHT_DECAY, metavar="X")


def _export(command: argparse.ArgumentParser) -> None:
    command.add_argument("out", type=Path, metavar="OUT", help="the file; model-card.md is written beside it")
    command.add_argument("--format", choices=list(FORMATS), default="safetensors")
