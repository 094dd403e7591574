"""Shared parts of the command lines: one-line errors, exit statuses, argument types and help texts."""

from __future__ import annotations

import argparse
import difflib
import hashlib
import math
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import fastbyol
from fastbyol.errors import ConfigError
from fastbyol.ranges import FLOAT32_SAFE, SIDE_MAX, THREADS_MAX
from fastbyol.system.limits import available_cores

DONE, RANK_LOST, BAD_INPUT, DIVERGED, INTERRUPTED = 0, 1, 2, 3, 75  # exit statuses
THREADS = (
    "threads that compute, on a CPU (default: OMP_NUM_THREADS, which torchrun sets; else the fastest, by measuring)"
)
# of fastbyol-prep write, which a command of images takes by way of --prep alone
PREP_FLAGS = (
    *("--classes-from", "--image-key", "--jpeg-share", "--label-column", "--labels", "--labels-from", "--limit"),
    *("--max-pixels", "--max-side", "--mode", "--quality", "--stretch"),
)
ANY_SOURCE = "a .beton, or any SOURCE of fastbyol-prep write"
WORKERS = "decoding threads (default: the cores of this rank less 2 on cuda, 2 on a CPU)"


class HelpFormatter(argparse.HelpFormatter):
    """The layout of --help: the default of an option stands at the end of its help."""

    def _get_help_string(self, action: argparse.Action) -> str:  # the hook of argparse.ArgumentDefaultsHelpFormatter
        text = action.help or ""
        has_none = action.nargs == 0 or action.default is None or action.default == argparse.SUPPRESS
        if has_none or not action.option_strings or "default" in text:
            return text
        values = action.default if isinstance(action.default, list | tuple) else (action.default,)
        shown = " ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in values)
        return f"{text} (default: {shown})" if shown else text


class EpilogFormatter(HelpFormatter):
    """The same layout, with texts of several lines left as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:  # the hook of argparse.RawDescriptionHelpFormatter
        return text if "\n" in text else super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line and exit status 2, and whose help shows defaults."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": HelpFormatter, **settings})

    def parse_args(  # type: ignore[override]  # one signature for argparse's three
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse a command line; unknown words are an error that names the nearest flag."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(describe_unknown(unknown, known=flags_of(self)))
        return found

    def error(self, message: str) -> NoReturn:
        """Print the error as one line and exit."""
        self.exit(BAD_INPUT, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def flags_of(parser: argparse.ArgumentParser) -> list[str]:
    """List the flags of a parser and of its subcommands."""
    found: list[str] = []
    for action in parser._actions:
        found += action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                found += flags_of(child)
    return found


def describe_unknown(words: Sequence[str], *, known: Sequence[str]) -> str:
    """Describe words that a command does not take: how to give the first flag to fastbyol-prep, or the nearest one."""
    flag = next((word.partition("=")[0] for word in words if word.startswith("--")), "")
    described = f"unrecognized arguments: {' '.join(words)}"
    if flag in PREP_FLAGS and "--prep" in known:
        given = shlex.quote(shlex.join(words))
        return f"{described}; {flag} is a flag of fastbyol-prep write: give it as --prep {given}"
    alike = difflib.get_close_matches(flag, known, n=1)
    return described + (f"; the nearest flag is {alike[0]}" if alike else "")


class VersionAction(argparse.Action):
    """--version: print the version and exit; it is looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        """Print the command and fastbyol's version."""
        print(f"{parser.prog} {fastbyol.__version__}")
        parser.exit()


def add_version(parser: argparse.ArgumentParser) -> None:
    """Add --version."""
    parser.add_argument(
        "--version",
        action=VersionAction,
        nargs=0,
        default=argparse.SUPPRESS,
        help="print the version of fastbyol and exit",
    )


def format_list(rows: Mapping[str, str], *, indent: int = 2) -> str:
    """Format names with a text each, wrapped to the width of the terminal."""
    width = max(shutil.get_terminal_size().columns - 2, 40)
    column = min(max(map(len, rows), default=0) + indent + 2, width // 2)
    lines: list[str] = []
    for name, text in rows.items():
        head = f"{' ' * indent}{name}  ".ljust(column)
        if len(head) > column:
            lines.append(head.rstrip())
            head = " " * column
        lines += textwrap.wrap(text, width, initial_indent=head, subsequent_indent=" " * column, break_on_hyphens=False)
    return "\n".join(lines)


def fail(command: str, error: Exception, *, status: int) -> int:
    """Print an exception as one line on stderr and return the status."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        text = f"{place}{error.strerror}; check the path, its permissions and the space left"
    print(f"{command}: error: {' '.join(text.split())}", file=sys.stderr)
    return status


@contextmanager
def naming_memory() -> Iterator[None]:
    """Raise ConfigError where the with-block asks torch or numpy for more memory than this machine has."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        asked = re.search(r"can't allocate memory: you tried to allocate (\d+) bytes", str(error))
        if asked is None and not isinstance(error, MemoryError) and "Storage size calculation" not in str(error):
            raise
        found = "" if asked is None else f" for {int(asked[1]) / 2**30:.3g} GiB at once"
        raise ConfigError(
            f"this machine has too little memory{found}; give a smaller network, batch or side of images"
        ) from error


def is_address(source: str) -> bool:
    """Return whether a source is an address as fsspec reads it, s3://bucket/photos, rather than a path."""
    return re.match(r"([a-z0-9]+::)*[A-Za-z][A-Za-z0-9+.-]*://", source) is not None


def address_digest(address: str) -> str:
    """Return eight hex digits that stand for an address, with its password and all that shown() leaves out."""
    return hashlib.blake2b(address.rstrip("/").encode(errors="surrogateescape"), digest_size=4).hexdigest()


def shown(address: str) -> str:
    """Return an address without a password, what follows a ?, where a signature may stand, and a / at its end.

    A password ends at the last @ before a /. One that holds a / or ? itself is told by its beginning, which is no port;
    then all up to the last @ is left out, and where that may belong to the query, all that follows, too.
    """
    usual, broken = r"[^/?#]*@", r"(?!\d*(?:[/?#]|$))(?:[^?]*@|.*@.*)"
    plain = re.sub(rf"(?<=://)([^/?#@:]*):(?!:)(?:{usual}|{broken})", r"\1@", address)
    return re.sub(r"(?<=[^:/])/+$", "", re.sub(r"(https?://[^?]*)\?.*", r"\1", plain))


def local_path(text: str) -> Path:
    """Parse a path on this machine."""
    if is_address(text):
        raise argparse.ArgumentTypeError(f"{shown(text)} given; wanted a path on this machine, so copy it here")
    return Path(text)


def positive_number(text: str) -> float:
    """Parse a number above 0."""
    return _number(text, "more than 0", lambda value: value > 0)


def fraction(text: str) -> float:
    """Parse a number from 0 to 1."""
    return _number(text, "from 0 to 1", lambda value: 0 <= value <= 1)


def proper_fraction(text: str) -> float:
    """Parse a number strictly between 0 and 1."""
    return _number(text, "between 0 and 1", lambda value: 0 < value < 1)


def share(text: str) -> float:
    """Parse a number above 0 and at most 1."""
    return _number(text, "above 0 and at most 1", lambda value: 0 < value <= 1)


def nonnegative_number(text: str) -> float:
    """Parse a number of at least 0."""
    return _number(text, "of at least 0", lambda value: value >= 0)


def _number(text: str, wanted: str, is_valid: Callable[[float], bool]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (is_valid(value) and value <= FLOAT32_SAFE):
        most = f", at most {FLOAT32_SAFE}" if value > FLOAT32_SAFE else ""
        raise argparse.ArgumentTypeError(f"{text!r} given; wanted a number {wanted}{most}")
    return value


def seed(text: str) -> int:
    """Parse a seed, from 0 to 2^63 - 1."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} given; wanted a whole number from 0 to 2^63 - 1")
    return int(text)


def int_range(low: int, high: int | None = None) -> Callable[[str], int]:
    """Return an argparse type for whole numbers from low to high."""

    def number(text: str) -> int:
        wanted = f"a whole number from {low}" + ("" if high is None else f" to {high}")
        if not text.isdecimal() or int(text) < low or (high is not None and int(text) > high):
            raise argparse.ArgumentTypeError(f"{text!r} given; wanted {wanted}")
        return int(text)

    return number


whole_number = int_range(1)
thread_count = int_range(1, THREADS_MAX)


def add_workers(command: argparse._ActionsContainer) -> None:
    """Add --workers, by default all cores this process may use, since it does nothing else meanwhile."""
    command.add_argument(
        "--workers", type=thread_count, default=available_cores(), metavar="N", help="threads (default: one a core)"
    )


def add_cache_flags(group: argparse._ActionsContainer) -> None:
    """Add --cache and --prep, for images that are no .beton."""
    group.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="where images that are no .beton are converted to, once (default: cache, beside the run's folder)",
    )
    group.add_argument(
        "--prep",
        type=shell_words,
        default=[],
        metavar="FLAGS",
        help="options of fastbyol-prep write for all images given here that are no .beton, in quotes: '--labels none'",
    )


def add_encoder(parser: argparse.ArgumentParser) -> None:
    """Add ENCODER, the encoder that a command uses."""
    parser.add_argument(
        "encoder",
        metavar="ENCODER",
        help="a run of fastbyol-train, finished or not, a checkpoint, an exported file or folder, torchvision:NAME, "
        "timm:NAME, or random:NAME of an encoder or recipe, which is drawn",
    )


def add_view(group: argparse._ActionsContainer) -> None:
    """Add --px and --margin, at which an encoder sees images."""
    group.add_argument(
        "--px",
        type=int_range(8, SIDE_MAX),
        metavar="N",
        help="side at which the encoder sees images (default: the run's or recipe's, else 224; an exported file of "
        "fastbyol's needs it)",
    )
    group.add_argument(
        "--margin",
        type=share,
        metavar="SHARE",
        help="share of an image's short side that the centre square shows (default: the run's or recipe's, 1 for an "
        "exported file of fastbyol's, else 0.875)",
    )


def join_prep(argv: Sequence[str]) -> list[str]:
    """Join --prep and the word behind it, which argparse would take for another flag if it begins with --."""
    given = list(argv)
    for index, word in enumerate(given[:-1]):
        if word == "--prep":
            return [*given[:index], f"--prep={given[index + 1]}", *given[index + 2 :]]
    return given


def shell_words(text: str) -> list[str]:
    """Split a text into words as a shell does."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} given; wanted words as in a shell ({error})") from None


def add_overwrite(command: argparse._ActionsContainer) -> None:
    """Add --overwrite."""
    command.add_argument("--overwrite", action="store_true", help="replace existing output")
