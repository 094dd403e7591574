"""`python -m fastbyol`: the commands of fastbyol, with a line each."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fastbyol.system.command_line import DONE, EpilogFormatter, Parser, add_version, format_list
from fastbyol.system.output import run_command

SHELLS = ("bash", "zsh")
COMMANDS = {
    "fastbyol-prep": "turn images into .beton files, and check them",
    "fastbyol-train": "train an encoder within a budget, or for a number of epochs",
    "fastbyol-eval": "score the encoder of a run by a protocol, or export it",
    "fastbyol-embed": "turn images into vectors, with near copies, groups and a map",
}


def build_parser() -> Parser:
    """Build the parser, whose help lists the commands."""
    parser = Parser(
        prog="fastbyol",
        usage="python -m fastbyol [options]",
        description="BYOL encoders from a folder of images and a deadline.",
        epilog=f"commands, each with --help:\n{format_list(COMMANDS)}",
        formatter_class=EpilogFormatter,
    )
    add_version(parser)
    parser.add_argument(
        "--completion",
        choices=SHELLS,
        metavar="SHELL",
        help="print a script by which bash or zsh completes all commands, and exit (default: list them)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the commands, or the script of --completion; return 0."""
    parser = build_parser()
    shell = parser.parse_args(argv).completion
    if shell is None:
        parser.print_help()
    else:
        # they import every protocol, and torch
        from fastbyol.cli.completion import script  # noqa: PLC0415
        from fastbyol.data_prep.cli import build_parser as build_prep  # noqa: PLC0415

        print(script(shell, build_prep()), end="")
    return DONE


if __name__ == "__main__":
    sys.exit(run_command("fastbyol", main))
