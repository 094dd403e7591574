"""The command fastbyol-prep, with its subcommands write, verify, info and demo."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from fastbyol.beton import BetonError, Reader
from fastbyol.data_prep import duplicates, flags, write
from fastbyol.data_prep.convert import BadImages
from fastbyol.data_prep.formats import ImageError
from fastbyol.data_prep.info import describe, format_lines
from fastbyol.data_prep.partial import can_continue
from fastbyol.data_prep.pixels import silence_decoders
from fastbyol.data_prep.settings import SettingsError
from fastbyol.data_prep.sources.base import SourceError
from fastbyol.data_prep.verify import has_checksum, verify
from fastbyol.jpeg import require_pillow
from fastbyol.system.command_line import EpilogFormatter, Parser, add_overwrite, add_version, add_workers, int_range
from fastbyol.system.output import run_command
from fastbyol.system.signals import interrupt_on_signals

BAD_INPUT, INTERRUPTED = 2, 75
FAULTS_SHOWN = 20  # by verify


class UsageError(ValueError):
    """A wrong flag or argument."""


class _Parser(Parser):
    """A parser that raises UsageError instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments") and " -" not in message:
            message = f"{message:.99} given after SOURCE and OUT.beton; quote a pattern such as 's-{{0..9}}.tar'"
        raise UsageError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 when done, 2 on bad usage or input, 75 when interrupted."""
    return run_command("fastbyol-prep", partial(run, argv))


def run(argv: Sequence[str] | None) -> int:
    """Run one command, print an error in one line, and return the exit status."""
    arguments = argparse.Namespace()
    try:
        build_parser().parse_args(argv, arguments)
        require_pillow()
        with interrupt_on_signals(), warnings.catch_warnings():
            silence_decoders()
            status: int = arguments.run(arguments)
    except BadImages as error:
        for line in error.listed:
            print(f"fastbyol-prep: {' '.join(line.split())}", file=sys.stderr)
        return _fail(str(error))
    except (UsageError, BetonError, SourceError, SettingsError, ImageError) as error:
        return _fail(str(error))
    except OSError as error:
        place = error.filename or getattr(arguments, "out", None) or getattr(arguments, "file", "output")
        return _fail(f"{place}: {error.strerror or error}; check the path, its permissions and the space left")
    except KeyboardInterrupt:
        out = getattr(arguments, "out", None)
        copy = getattr(arguments, "copy", None)  # of a source that lies elsewhere
        is_kept = out is not None and out.parent.is_dir() and (can_continue(out) or (copy and copy.exists()))
        left = "; the same command goes on where it was" if is_kept else "; unfinished files were removed"
        print(f"fastbyol-prep: interrupted{'' if out is None else left}", file=sys.stderr)
        return INTERRUPTED
    return status


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all four commands; their flags and outputs are a contract and do not change."""
    parser = _Parser(prog="fastbyol-prep", description="Turn images into .beton files and check them.")
    add_version(parser)
    commands = parser.add_subparsers(required=True, title="commands, each with --help", metavar="COMMAND")
    command = commands.add_parser(
        "write",
        help="write a .beton from images, wherever they lie",
        epilog=flags.describe_sources(),
        formatter_class=EpilogFormatter,
    )
    flags.add_arguments(command)
    command.set_defaults(run=write.run)
    command = commands.add_parser("verify", help="check structure, checksums and that every image decodes")
    command.add_argument("file", metavar="FILE", type=Path, help="a .beton")
    add_workers(command)
    command.set_defaults(run=_run_verify)
    command = commands.add_parser("info", help="say what a .beton holds")
    command.add_argument("file", metavar="FILE", type=Path, help="a .beton")
    command.add_argument("--json", action="store_true", help="print every fact as one JSON object")
    command.add_argument(
        "--duplicates",
        nargs="?",
        choices=("exact", "near"),
        const="exact",
        help="list copies instead: exact, of the same bytes; near, of pictures that look the same (default: exact)",
    )
    command.set_defaults(run=_run_info)
    command = commands.add_parser("demo", help="draw the demo set: DIR/train.beton and DIR/val.beton")
    command.add_argument("directory", metavar="DIR", type=Path, help="folder of both files")
    command.add_argument("--seed", type=int_range(0), default=0, metavar="N", help="seed of the drawing")
    add_overwrite(command)
    command.set_defaults(run=_run_demo)
    return parser


def _run_verify(arguments: argparse.Namespace) -> int:
    faults = 0
    with Reader(arguments.file) as reader:
        count, is_summed = len(reader), has_checksum(reader)
        for fault in verify(reader, workers=arguments.workers):
            faults += 1
            if faults <= FAULTS_SHOWN:
                print(fault)
    if faults:
        return _fail(f"{arguments.file}: {faults} faults in {count} samples; write the file again or restore a copy")
    rest = (
        "checksums match" if is_summed else "no checksum in a sidecar, so a bit flip that still decodes is not detected"
    )
    print(f"{arguments.file}: {count} samples decode; {rest}")
    return 0


def _run_info(arguments: argparse.Namespace) -> int:
    with Reader(arguments.file) as reader:
        if arguments.duplicates is not None:
            groups = duplicates.exact(reader) if arguments.duplicates == "exact" else duplicates.near(reader)
            listed = duplicates.name_groups(reader, groups)
            print(json.dumps(listed) if arguments.json else "\n".join(duplicates.format_groups(reader, listed)))
            return 0
        facts = describe(reader)
    print(json.dumps(facts) if arguments.json else "\n".join(format_lines(facts)))
    return 0


def _run_demo(arguments: argparse.Namespace) -> int:
    from fastbyol.data_prep import demo  # noqa: PLC0415 - only this command draws

    for path in demo.write(arguments.directory, seed=arguments.seed, overwrite=arguments.overwrite):
        print(path)
    return 0


def _fail(message: str) -> int:
    """Print the error on one line and return the exit status of bad input."""
    print(f"fastbyol-prep: error: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
