"""Know the commands of fastbyol-prep: write, verify, info, demo; their flags, exit statuses and one-line errors."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from fastbyol.beton import SIDE_MAX, BetonError, Reader
from fastbyol.data_prep.convert import convert
from fastbyol.data_prep.describe import describe, lines
from fastbyol.data_prep.images import MODES, ImageError, Settings
from fastbyol.data_prep.parallel import default_workers
from fastbyol.data_prep.sources import SourceError, open_source
from fastbyol.data_prep.verify import has_checksum, verify
from fastbyol.data_prep.writer import find_partials, require_output

BAD_INPUT, INTERRUPTED = 2, 75
FAULTS_SHOWN = 20


class UsageError(ValueError):
    """Tell which flag or argument is wrong."""


class _Parser(argparse.ArgumentParser):
    """Raise UsageError where argparse would print the usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0 when done, 2 on bad usage or input, 75 when interrupted."""
    arguments = argparse.Namespace()
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names need not be text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        build_parser().parse_args(argv, arguments)
        with _signals_interrupt(), warnings.catch_warnings():
            # What Pillow warns about is refused by images.py or concerns metadata nobody reads here.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            status: int = arguments.run(arguments)
            sys.stdout.flush()
    except (UsageError, BetonError, SourceError, ImageError) as error:
        return _fail(str(error))
    except BrokenPipeError:
        # The reader of our output left, as `| head` does; stdout is closed so that the interpreter does not retry.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        place = error.filename or getattr(arguments, "out", None) or getattr(arguments, "file", "output")
        return _fail(f"{place}: {error.strerror or error}; check the path, its permissions and the space left")
    except KeyboardInterrupt:
        print("fastbyol-prep: interrupted: no unfinished file was left", file=sys.stderr)
        return INTERRUPTED
    return status


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all four commands; flags and outputs are a contract (docs/design.md)."""
    parser = _Parser(prog="fastbyol-prep", description="Turn images into .beton files and check them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_write(commands.add_parser("write", help="write a .beton from a folder or .tar of images"))
    command = commands.add_parser("verify", help="check structure, checksums and that every image decodes")
    command.add_argument("file", metavar="FILE", type=Path)
    _add_workers(command)
    command.set_defaults(run=_run_verify)
    command = commands.add_parser("info", help="say what a .beton holds")
    command.add_argument("file", metavar="FILE", type=Path)
    command.add_argument("--json", action="store_true", help="print every fact as one JSON object")
    command.set_defaults(run=_run_info)
    command = commands.add_parser("demo", help="draw the demo set: DIR/train.beton and DIR/val.beton")
    command.add_argument("directory", metavar="DIR", type=Path)
    command.add_argument("--seed", type=_at_least(0), default=0, metavar="N", help="of the drawing (default 0)")
    _add_overwrite(command)
    command.set_defaults(run=_run_demo)
    return parser


def _add_write(command: argparse.ArgumentParser) -> None:
    """Declare the flags of `write`."""
    defaults = Settings()
    command.add_argument(
        "source", metavar="SOURCE", type=Path, help="class folders, a flat folder, or a .tar of either"
    )
    command.add_argument("out", metavar="OUT.beton", type=Path)
    command.add_argument(
        "--max-side",
        type=_at_least(1, SIDE_MAX),
        default=defaults.max_side,
        metavar="PX",
        help=f"shrink the longest side to this, never enlarge (default {defaults.max_side})",
    )
    command.add_argument(
        "--quality",
        type=_at_least(1, 100),
        default=defaults.quality,
        metavar="Q",
        help=f"JPEG quality, 4:2:0 (default {defaults.quality})",
    )
    command.add_argument(
        "--mode",
        choices=MODES,
        default=defaults.mode,
        help="jpeg: re-encode all; raw: RGB bytes; passthrough: keep upright baseline RGB JPEGs within --max-side byte "
        f"for byte, re-encode the rest (default {defaults.mode})",
    )
    _add_workers(command)
    command.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="a bad image ends the command, or is left out and recorded in the sidecar (default fail)",
    )
    command.add_argument("--limit", type=_at_least(1), metavar="N", help="take N images, spread evenly over the source")
    _add_overwrite(command)
    command.set_defaults(run=_run_write)


def _add_workers(command: argparse.ArgumentParser) -> None:
    workers = default_workers()
    command.add_argument(
        "--workers", type=_at_least(1), default=workers, metavar="N", help="threads (default: one a core)"
    )


def _add_overwrite(command: argparse.ArgumentParser) -> None:
    command.add_argument("--overwrite", action="store_true", help="replace existing output")


def _run_write(arguments: argparse.Namespace) -> int:
    require_output(arguments.out, overwrite=arguments.overwrite)
    for left in find_partials(arguments.out):
        note = (
            f"{left} ({left.stat().st_size / 1e6:.0f} MB) was left by a killed write; remove it unless one is running"
        )
        print(f"fastbyol-prep: note: {note}", file=sys.stderr)
    start = time.monotonic()
    settings = Settings(arguments.mode, arguments.max_side, arguments.quality)
    source = open_source(arguments.source)
    done = convert(
        source,
        arguments.out,
        settings,
        workers=arguments.workers,
        on_error=arguments.on_error,
        limit=arguments.limit,
        overwrite=arguments.overwrite,
    )
    seconds = time.monotonic() - start
    classes = f"{len(source.class_names)} classes" if source.class_names else "no labels"
    print(
        f"{arguments.out}: {done.written} images, {classes}, {arguments.out.stat().st_size / 1e6:.1f} MB in "
        f"{seconds:.1f} s ({(done.written + len(done.skipped)) / seconds:.0f} images/s)"
    )
    if source.ignored:
        print(f"ignored {source.ignored} files that are not named as images, or are links in an archive")
    if done.skipped:
        name, reason = done.skipped[0]
        print(f"skipped {len(done.skipped)} bad images, listed in {arguments.out}.json; the first: {name}: {reason}")
    return 0


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
    rest = "checksums match" if is_summed else "no checksum in a sidecar: a bit flip that still decodes goes unseen"
    print(f"{arguments.file}: {count} samples decode; {rest}")
    return 0


def _run_info(arguments: argparse.Namespace) -> int:
    with Reader(arguments.file) as reader:
        facts = describe(reader)
    print(json.dumps(facts) if arguments.json else "\n".join(lines(facts)))
    return 0


def _run_demo(arguments: argparse.Namespace) -> int:
    from fastbyol.data_prep import demo  # noqa: PLC0415 - the drawing is needed by this command only

    for path in demo.write(arguments.directory, seed=arguments.seed, overwrite=arguments.overwrite):
        print(path)
    return 0


def _at_least(low: int, high: int | None = None) -> Callable[[str], int]:
    """Return an argparse type: a whole number from low to high."""

    def number(text: str) -> int:
        wanted = f"a whole number from {low}" + ("" if high is None else f" to {high}")
        if not text.isdecimal() or int(text) < low or (high is not None and int(text) > high):
            raise argparse.ArgumentTypeError(f"{text!r} given; wanted {wanted}")
        return int(text)

    return number


def _fail(message: str) -> int:
    """Print one line for the error; return the exit status of bad input."""
    print(f"fastbyol-prep: error: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise KeyboardInterrupt once; later ones must not cut the cleanup short."""
    watched = (signal.SIGINT, signal.SIGTERM)

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        for number in watched:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [signal.signal(number, interrupt) for number in watched]
    try:
        yield
    finally:
        for number, handler in zip(watched, before, strict=True):
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
