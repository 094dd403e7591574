"""The flags of fastbyol-prep write, and what its help says of sources."""

from __future__ import annotations

import argparse
import shutil
import textwrap

from fastbyol.beton import SIDE_MAX
from fastbyol.data_prep.convert import ON_ERROR
from fastbyol.data_prep.settings import JPEG_SHARE, MODES, PIXELS_LIMIT, SMALL_SIDE, Settings
from fastbyol.data_prep.sources.classes import LABELS
from fastbyol.system.command_line import add_overwrite, add_workers, format_list, fraction, int_range, local_path

SOURCES = {
    "FOLDER": "class folders with all that lies below them, or images without labels; see --labels",
    "FILE.tar": "the same in an archive, or ILSVRC2012_img_train.tar, with one .tar per class",
    "'shard-{0000..0099}.tar'": 'WebDataset shards, quoted; label from .cls, "label" in .json, or a number in .txt',
    "FILE.zip": "the same as in FILE.tar",
    "FILE.txt, FILE.csv": "a list: a path a line, with a label or not; a table with columns path and label",
    "FILE.parquet, FILE.arrow": "image bytes, or paths, and a column \"label\"; needs pip install 'fastbyol[parquet]'",
    "'data/train-*.parquet'": "the same in several files, quoted; a FOLDER of them, or of save_to_disk, will do, too",
    "cifar-10-batches-py": "CIFAR's folder or .tar.gz for its training images, or a file in it such as test_batch",
    "train-images-idx3-ubyte.gz": "MNIST's files, gzipped or not; the labels lie beside the images",
    "s3://bucket/photos": "these, but no list, elsewhere: https://, hf:// or what else fsspec reads; fetched first; "
    "needs pip install 'fastbyol[remote]'",
}
ENDING = "Without labels it writes an image-only .beton. A file named OUT.beton is always complete."


def describe_sources() -> str:
    """Return the end of the help of `write`: what SOURCE can be."""
    width = max(shutil.get_terminal_size().columns - 2, 40)
    return f"SOURCE is one of\n{format_list(SOURCES)}\n{textwrap.fill(ENDING, width)}"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the flags of `write`."""
    command.add_argument("source", metavar="SOURCE", help="where the images lie, see below")
    command.add_argument(
        "out",
        metavar="OUT.beton",
        type=local_path,
        help="the file to write; or a folder, for a file named after SOURCE, its present files and these flags, "
        "which is written unless it is there",
    )
    _add_images(command)
    _add_selection(command)
    add_workers(command.add_argument_group("machine"))


def _add_images(command: argparse.ArgumentParser) -> None:
    group, defaults = command.add_argument_group("images"), Settings()
    group.add_argument(
        "--max-side",
        type=int_range(1, SIDE_MAX),
        default=defaults.max_side,
        metavar="PX",
        help="shrink the longest side to this, never enlarge",
    )
    group.add_argument(
        "--quality", type=int_range(1, 100), default=defaults.quality, metavar="Q", help="JPEG quality, 4:2:0"
    )
    group.add_argument(
        "--mode",
        choices=MODES,
        default=defaults.mode,
        help=f"auto: images up to {SMALL_SIDE} px as they are, JPEGs byte for byte and lossless ones raw, larger ones "
        "as JPEG; jpeg: re-encode all; raw: RGB bytes; passthrough: keep upright baseline RGB JPEGs within --max-side "
        "byte for byte, re-encode the rest; proportion: jpeg and raw, mixed by --jpeg-share",
    )
    group.add_argument(
        "--jpeg-share",
        type=fraction,
        metavar="P",
        help=f"in mode proportion, the share of JPEGs, chosen by a hash of each file (default: {JPEG_SHARE})",
    )
    group.add_argument(
        "--max-pixels",
        type=int_range(1, PIXELS_LIMIT),
        default=defaults.max_pixels,
        metavar="N",
        help="the largest image that is decoded, at 3 bytes a pixel; a larger JPEG is scaled while it is decoded, "
        "others are bad images",
    )
    group.add_argument(
        "--stretch",
        nargs="?",
        type=percentiles,
        const=(0.0, 100.0),
        metavar="LOW,HIGH",
        help="gray of 16 or 32 bits, or floats: these percentiles of each image become black and white; without a "
        "value its least and greatest (default: linear over the type's range, 0 to 1 for floats)",
    )


def percentiles(text: str) -> tuple[float, float]:
    """Parse two percentiles, as in 1,99."""
    low, comma, high = text.partition(",")
    try:
        return float(low), float(high if comma else "nan")
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} given; wanted two percentiles, as in 1,99") from None


def _add_selection(command: argparse.ArgumentParser) -> None:
    labels = command.add_argument_group("labels")
    labels.add_argument(
        "--classes-from",
        type=local_path,
        metavar="FILE",
        help="number the classes as another .beton does, its .json, or a .json list of names; classes may be missing "
        "here, an unknown one is an error (default: the source's own numbers)",
    )
    labels.add_argument(
        "--labels",
        choices=LABELS,
        default="auto",
        help="what is a class: top, each folder directly in SOURCE, with all below it; parent, each folder that holds "
        "images; none, nothing, whatever SOURCE says; auto, top if there are folders, none if there are none, an error "
        "if that is not clear",
    )
    labels.add_argument(
        "--label-column",
        metavar="NAME",
        help="where the label is: a column of a table, a .json key, a suffix of a shard's files, coarse_labels of "
        'CIFAR-100 (default: "label", "cls", fine_labels)',
    )
    labels.add_argument(
        "--labels-from",
        type=local_path,
        metavar="FILE",
        help="labels of an unlabelled source: a .txt of lines NAME LABEL, or a .csv with columns path and label",
    )
    labels.add_argument(
        "--image-key", metavar="SUFFIX", help="suffix of the image, where a sample of WebDataset shards has several"
    )
    output = command.add_argument_group("output")
    output.add_argument("--limit", type=int_range(1), metavar="N", help="take N images, spread evenly (default: all)")
    output.add_argument(
        "--on-error",
        choices=ON_ERROR,
        default="fail",
        help="bad images: fail, read all, list those and write nothing; skip, leave them out and list them in "
        "OUT.beton.json; keep, take what decodes of them",
    )
    add_overwrite(output)
