"""The command fastbyol-prep write: its flags and its output."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
import time
from pathlib import Path

from fastbyol.beton import SIDE_MAX
from fastbyol.data_prep import reuse
from fastbyol.data_prep.convert import ON_ERROR, ConversionResult, convert
from fastbyol.data_prep.formats import available_plugins, describe_ignored
from fastbyol.data_prep.partial import remove_stale
from fastbyol.data_prep.settings import JPEG_SHARE, MODES, PIXELS_LIMIT, SMALL_SIDE, Settings
from fastbyol.data_prep.sources import files_of, listing, open_source
from fastbyol.data_prep.sources.base import Source
from fastbyol.data_prep.sources.classes import LABELS, count_classes
from fastbyol.data_prep.sources.labels import RelabelledSource, read_class_names
from fastbyol.data_prep.writer import require_output, version
from fastbyol.system.command_line import add_overwrite, add_workers, format_list, fraction, int_range

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
}
ENDING = "Without labels it writes an image-only .beton. A file named OUT.beton is always complete."


def describe_sources() -> str:
    """Return the end of the help of `write`: what SOURCE can be."""
    width = max(shutil.get_terminal_size().columns - 2, 40)
    return f"SOURCE is one of\n{format_list(SOURCES)}\n{textwrap.fill(ENDING, width)}"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the flags of `write`."""
    command.add_argument("source", metavar="SOURCE", type=Path, help="where the images lie, see below")
    command.add_argument(
        "out",
        metavar="OUT.beton",
        type=Path,
        help="the file to write; or a folder, for a file named after SOURCE, its present files and these flags, "
        "which is written unless it is there",
    )
    _add_images(command)
    _add_selection(command)
    add_workers(command.add_argument_group("machine"))
    command.set_defaults(run=run)


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
        type=Path,
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
        type=Path,
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


def run(arguments: argparse.Namespace) -> int:
    """Write the .beton, report on it and return the exit status."""
    settings = Settings(
        arguments.mode,
        arguments.max_side,
        arguments.quality,
        arguments.jpeg_share,
        max_pixels=arguments.max_pixels,
        stretch=arguments.stretch,
    )
    key = _fingerprint(arguments, settings)
    if arguments.out.is_dir():
        arguments.out /= reuse.file_name(arguments.source, key)
        count = reuse.count_if_whole(arguments.out, key)
        if count is not None:
            _clear_partials(arguments.out, None)
            print(f"{arguments.out}: {count} images, unchanged since it was written")
            return 0
        arguments.overwrite = True  # what has this name is not whole
    require_output(arguments.out, overwrite=arguments.overwrite)
    _clear_partials(arguments.out, key)
    start = time.monotonic()
    source = open_source(
        arguments.source,
        labels=arguments.labels,
        label_column=arguments.label_column,
        image_key=arguments.image_key,
    )
    if arguments.labels_from is not None:
        source = listing.ListedLabels(source, arguments.labels_from)
    if arguments.classes_from is not None:
        names = read_class_names(arguments.classes_from)
        source = RelabelledSource(source, names, origin=arguments.classes_from)
    done = convert(
        source,
        arguments.out,
        settings,
        workers=arguments.workers,
        on_error=arguments.on_error,
        limit=arguments.limit,
        overwrite=arguments.overwrite,
        key=key,
    )
    _report(arguments, source, done, seconds=time.monotonic() - start)
    return 0


def _fingerprint(arguments: argparse.Namespace, settings: Settings) -> str:
    """Digest all that decides what is written."""
    names = ("labels", "label_column", "image_key", "limit", "on_error")
    chosen = (
        settings.facts()
        | {name: getattr(arguments, name) for name in names}
        | {"fastbyol": version(), "plugins": available_plugins()}
    )
    if arguments.labels_from is not None:
        chosen["labels_from"] = reuse.fingerprint([arguments.labels_from], {})
    if arguments.classes_from is not None:
        chosen["class_names"] = read_class_names(arguments.classes_from)
    return reuse.fingerprint(files_of(arguments.source), chosen)


def _report(arguments: argparse.Namespace, source: Source, done: ConversionResult, *, seconds: float) -> None:
    """Print what was written, and what was left out."""
    names = source.class_names
    classes = count_classes(names) if names else "no labels"
    print(
        f"{arguments.out}: {done.written} images, {classes}, {arguments.out.stat().st_size / 1e6:.1f} MB in "
        f"{seconds:.1f} s ({(done.written + len(done.skipped)) / seconds:.0f} images/s)"
    )
    if source.class_counts and (unlabelled := source.count - sum(source.class_counts)):
        print(f"{unlabelled} of {source.count} images have no label: training takes them, scores leave them out")
    if source.ignored:
        print(f"ignored {describe_ignored(source.ignored)}")
    if names and source.class_counts and 0 in source.class_counts and arguments.classes_from is None:
        empty = [name for name, count in zip(names, source.class_counts, strict=True) if not count]
        print(f"without images, but with a number: {count_classes(empty)}")
    if done.lossless_as_jpeg is not None:
        print(
            f"lossless images above {SMALL_SIDE} px, such as {done.lossless_as_jpeg}, became JPEG of quality "
            f"{arguments.quality}; --mode raw keeps their pixels, for 3 bytes each"
        )
    if done.repaired:
        name, reason = done.repaired[0]
        print(f"repaired {len(done.repaired)} images, listed in {arguments.out}.json; the first: {name}: {reason}")
    if done.skipped:
        name, reason = done.skipped[0]
        print(f"skipped {len(done.skipped)} bad images, listed in {arguments.out}.json; the first: {name}: {reason}")


def _clear_partials(out: Path, key: str | None) -> None:
    """Remove the files left by killed writes of this output, but those of the write with this key; report them."""
    removed, unknown = remove_stale(out, keep=key)
    for left in removed:
        print(f"fastbyol-prep: note: removed {left}, left by a killed write", file=sys.stderr)
    for left in unknown:
        print(
            f"fastbyol-prep: note: {left} is unfinished and cannot be locked; remove it unless a write is running",
            file=sys.stderr,
        )
