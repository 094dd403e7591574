"""`python -m fastbyol`: the commands of fastbyol, with a line each."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fastbyol.system.command_line import DONE, EpilogFormatter, Parser, add_version, format_list

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
        usage="python -m fastbyol [--version]",
        description="BYOL encoders from a folder of images and a deadline.",
        epilog=f"commands, each with --help:\n{format_list(COMMANDS)}",
        formatter_class=EpilogFormatter,
    )
    add_version(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the commands; return 0."""
    parser = build_parser()
    parser.parse_args(argv)
    parser.print_help()
    return DONE


if __name__ == "__main__":
    sys.exit(main())
