"""The command fastbyol-embed: its flags, checked before torch is imported."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fastbyol.system.command_line import (
    ANY_SOURCE,
    THREADS,
    WORKERS,
    Parser,
    add_cache_flags,
    add_encoder,
    add_overwrite,
    add_version,
    add_view,
    int_range,
    join_prep,
    seed,
    share,
    thread_count,
)

SUFFIXES = (".parquet", ".npz", ".csv", ".npy")  # of --out
DTYPES = ("float32", "float16")
LAYOUTS = ("pca", "tsne", "umap")
DESCRIPTION = (
    "Turn images into vectors by a trained encoder. Given again after it was stopped or killed, the command goes on "
    "where it was."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run fastbyol-embed; return the exit status: 0 done, 2 bad usage or input, 75 interrupted."""
    args = parse(join_prep(sys.argv[1:] if argv is None else argv))
    from fastbyol.cli.embed_run import run  # noqa: PLC0415 - it imports torch, which takes seconds

    return run(args)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; what contradicts itself is an error."""
    parser = build_parser()
    args = parser.parse_args(words)
    if args.layout is not None and args.map is None:
        parser.error(f"--layout {args.layout} is given without --map; give --map PAGE.html too")
    return args


def build_parser() -> Parser:
    """Build the parser; names and meanings of flags are a contract and do not change."""
    parser = Parser(prog="fastbyol-embed", description=DESCRIPTION)
    add_version(parser)
    add_encoder(parser)
    parser.add_argument("source", metavar="SOURCE", help=f"images, with labels or without: {ANY_SOURCE}")
    _add_output(parser.add_argument_group("vectors"))
    _add_more(parser.add_argument_group("from the vectors"))
    _add_images(parser.add_argument_group("images"))
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--device", choices=["cuda", "cpu"], help="where to compute (default: cuda where there is one)"
    )
    machine.add_argument("--threads", type=thread_count, metavar="N", help=THREADS)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _add_output(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--out",
        type=vector_file,
        required=True,
        metavar="FILE",
        help="the file, whose suffix names its form: .parquet, .npz, .csv, or .npy with the names in .names.txt beside",
    )
    group.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="type of the numbers")
    group.add_argument("--normalize", action="store_true", help="divide each vector by its length")
    add_overwrite(group)


def _add_more(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--neighbours",
        type=int_range(1, 1000),
        metavar="N",
        help="the N most similar images of each, into NAME.neighbours.parquet, or .csv (default: none)",
    )
    group.add_argument(
        "--duplicates",
        type=share,
        metavar="COSINE",
        help="pairs at least as similar, such as 0.98, into NAME.duplicates.parquet, or .csv (default: none)",
    )
    group.add_argument(
        "--clusters",
        type=int_range(2, 10_000),
        metavar="K",
        help="K groups by k-means, as a column cluster, 0 the largest (default: none)",
    )
    group.add_argument(
        "--map",
        type=page_file,
        metavar="PAGE.html",
        help="a map of the images to look at, one file that needs no network (default: none)",
    )
    group.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="how the map is laid out: principal components, or t-SNE or UMAP, which need packages (default: pca)",
    )
    group.add_argument("--seed", type=seed, default=0, metavar="N", help="seed of groups and layout")


def _add_images(group: argparse._ActionsContainer) -> None:
    add_cache_flags(group)
    group.add_argument("--workers", type=thread_count, metavar="N", help=WORKERS)
    group.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="an image that does not decode: stop, or leave it out",
    )
    add_view(group)


def vector_file(text: str) -> Path:
    """Parse the path of a file of vectors."""
    if Path(text).suffix not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text!r} given; wanted a name that ends in {', '.join(SUFFIXES)}")
    return Path(text)


def page_file(text: str) -> Path:
    """Parse the path of a page."""
    if Path(text).suffix != ".html":
        raise argparse.ArgumentTypeError(f"{text!r} given; wanted a name that ends in .html")
    return Path(text)
