"""The command fastbyol-eval: its protocols and commands, of which only the one asked for is imported."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fastbyol.ablations.paper import TABLES
from fastbyol.errors import ConfigError
from fastbyol.evaluate.protocol import Protocol
from fastbyol.registry import PROTOCOL_SUMMARIES, PROTOCOLS
from fastbyol.system.command_line import (
    ANY_SOURCE,
    THREADS,
    WORKERS,
    EpilogFormatter,
    Parser,
    add_cache_flags,
    add_encoder,
    add_version,
    add_view,
    format_list,
    join_prep,
    thread_count,
    whole_number,
)

FORMATS = ("safetensors", "pth", "timm", "detectron2", "onnx")  # of an export
COMMANDS = {
    "export": "the encoder in a file for fastbyol, torchvision, timm, detectron2 or ONNX",
    "table": "an ablation table of the paper: trains every cell, and writes the scores beside the paper's",
}
OWN = {
    "MODULE:ATTRIBUTE": "a fastbyol.evaluate.protocol.Protocol of your own, in a module in this folder or on PYTHONPATH"
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run fastbyol-eval; return the exit status: 0 done, 2 bad usage or input, 75 interrupted."""
    args, protocol = parse(join_prep(sys.argv[1:] if argv is None else argv))
    from fastbyol.cli.eval_run import run  # noqa: PLC0415 - it imports torch, which takes seconds

    return run(args, protocol)


def parse(words: Sequence[str]) -> tuple[argparse.Namespace, Protocol | None]:
    """Parse a command line; return the flags, and the protocol unless it is a command."""
    parser = build_parser()
    if not words or words[0].startswith("-"):
        parser.parse_args(words)
        parser.error("no protocol given; give one first, as in fastbyol-eval knn RUN")
    name = words[0]
    try:
        protocol = None if name in COMMANDS else find_protocol(name)
    except ConfigError as error:
        parser.error(str(error))
    return build_command_parser(name, protocol).parse_args(words[1:], argparse.Namespace(protocol=name)), protocol


def build_parser() -> Parser:
    """Build the parser of --help and --version, whose help lists the protocols and commands."""
    summaries = {name: PROTOCOL_SUMMARIES.get(name, target) for name, target in PROTOCOLS.items()}
    parser = Parser(
        prog="fastbyol-eval",
        usage="fastbyol-eval PROTOCOL ENCODER [options]\n       fastbyol-eval PROTOCOL --help",
        description="Score an encoder by a protocol, or export that of a run.",
        epilog=f"protocols:\n{format_list(summaries | OWN)}\n\ncommands:\n{format_list(COMMANDS)}",
        formatter_class=EpilogFormatter,
    )
    add_version(parser)
    return parser


def find_protocol(name: str) -> Protocol:
    """Import a protocol; raise ConfigError for an unknown name, or another kind of object."""
    names = [*PROTOCOLS, *COMMANDS]
    if name not in names and ":" not in name:
        raise ConfigError(f"no protocol {name!r}; give one of {', '.join(names)}, or your own as module:attribute")
    found = PROTOCOLS.find(name)
    if not isinstance(found, Protocol):
        raise ConfigError(f"{name} is a {type(found).__name__}; give a fastbyol.evaluate.protocol.Protocol")
    return found


def build_command_parser(name: str, protocol: Protocol | None) -> Parser:
    """Build the parser of a protocol or command; names and meanings of flags are a contract and do not change."""
    description = (PROTOCOL_SUMMARIES | COMMANDS).get(name, f"the protocol at {name}")
    parser = Parser(prog=f"fastbyol-eval {name}", description=f"{description[:1].upper()}{description[1:]}.")
    if name == "table":
        add_table_flags(parser)
        return parser
    if protocol is None:
        parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run of fastbyol-train, finished or not")
        parser.add_argument(
            "out",
            metavar="OUT",
            help="a file, with model-card.md beside it, or a folder, with model.safetensors, README.md and, for timm "
            "and hubs, config.json",
        )
        parser.add_argument(
            "--format",
            choices=FORMATS,
            help="what will read it (default: by the suffix; in a folder timm, or fastbyol)",
        )
    else:
        add_encoder(parser)
        if protocol.has_files:
            _add_files(parser, has_val=protocol.has_val)
        protocol.add_arguments(parser)
        _add_machine(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _add_files(parser: Parser, *, has_val: bool) -> None:
    group = parser.add_argument_group("data")
    what = "labelled images to learn from" if has_val else "images to represent, with labels or without"
    group.add_argument("--train", required=True, metavar="SOURCE", help=f"{what}: {ANY_SOURCE}")
    if has_val:
        group.add_argument("--val", required=True, metavar="SOURCE", help="labelled images to score on")
    add_cache_flags(group)
    add_view(group)
    group.add_argument("--workers", type=thread_count, metavar="N", help=WORKERS)
    group.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="an image that does not decode: stop, or take the next, with its label",
    )


def _add_machine(parser: Parser) -> None:
    group = parser.add_argument_group("machine")
    group.add_argument("--device", choices=["cuda", "cpu"], help="where to score (default: cuda where there is one)")
    group.add_argument("--threads", type=thread_count, metavar="N", help=THREADS)


def add_table_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command table."""
    parser.add_argument("name", metavar="NAME", choices=list(TABLES), help=f"one of {', '.join(TABLES)}")
    data = parser.add_argument_group("data")
    data.add_argument("--data", required=True, metavar="SOURCE", help=f"training images, labelled: {ANY_SOURCE}")
    data.add_argument("--val", required=True, metavar="SOURCE", help="labelled images to score on")
    add_cache_flags(data)
    runs = parser.add_argument_group("runs")
    runs.add_argument("--base", required=True, metavar="RECIPE", help="the recipe that each cell changes")
    length = runs.add_mutually_exclusive_group()
    length.add_argument("--budget", metavar="TIME", help="wall-clock of each run, such as 3m")
    length.add_argument("--epochs", type=float, metavar="N", help="length of each run (default: the recipe's)")
    runs.add_argument("--seeds", type=whole_number, default=3, metavar="N", help="runs of a cell, with seeds 0 to N-1")
    runs.add_argument(
        "--cells", type=whole_number, nargs="+", metavar="N", help="cells to run, counted from 1 (default: all)"
    )
    runs.add_argument(
        "--linear", action="store_true", help="also score each run by a linear classifier on cached representations"
    )
    runs.add_argument("--out", type=Path, metavar="DIR", help="folder of the table (default: runs/table-NAME)")
    runs.add_argument(
        "--with",
        dest="more",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="FLAGS",
        help="all that follows goes to fastbyol-train: --with --workers 8 --device cuda",
    )
