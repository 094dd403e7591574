"""Image sets of a call: carried archives unpacked and converted by fastbyol-prep, or the demo set in their place.

A set is a training file and a validation file, SET.train.beton and SET.val.beton. Where an archive holds one split
alone, every fifth image of it becomes the validation file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, from a checkout

from benchmarks.gpu.output import append_row

SETS = {"cifar10": "cifar", "imagenette": "imagenet"}  # a set's name, and how its archives' names begin
SPLITS = {"train": "train", "val": "val", "test": "val"}
HELD_OUT = 5
IMAGES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Set:
    """Name the two files of a set of images."""

    train: Path
    val: Path


def set_of(name: str, folder: Path) -> Set:
    """Return the paths of the files of a set."""
    return Set(folder / f"{name}.train.beton", folder / f"{name}.val.beton")


def archives(carried: Path, name: str) -> list[Path]:
    """List the archives of a set in the carried folder."""
    return sorted(path for path in carried.glob("*.tar*") if path.name.startswith(SETS[name]))


def unpack(sources: Sequence[Path], folder: Path, *, every: int) -> Counter[str]:
    """Write every n-th image of each class to folder/SPLIT/CLASS/; return how many each split got.

    Raises ValueError for an archive without .../SPLIT/CLASS/IMAGE.
    """
    seen: Counter[tuple[str, str]] = Counter()
    written: Counter[str] = Counter()
    for source in sources:
        before = written.total()
        for split, label, name, content in _images(source):
            seen[split, label] += 1
            if (seen[split, label] - 1) % every:
                continue
            target = folder / split / label / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            written[split] += 1
        if written.total() == before:
            raise ValueError(f"{source}: holds no image named .../train|val|test/CLASS/NAME.jpg")
    return written


def _images(source: Path) -> Iterator[tuple[str, str, str, bytes]]:
    """Yield split, class, name and bytes of the images of an archive."""
    with tarfile.open(source) as archive:
        for member in archive:
            parts = PurePosixPath(member.name).parts
            if member.isfile() and parts[-1].lower().endswith(IMAGES) and len(parts) >= 3 and parts[-3] in SPLITS:
                file = archive.extractfile(member)
                assert file is not None
                yield SPLITS[parts[-3]], parts[-2], parts[-1], file.read()


def hold_out(folder: Path) -> None:
    """Move every fifth image of the only split to the other one."""
    (present,) = (split for split in ("train", "val") if (folder / split).exists())
    if present == "val":
        (folder / "val").rename(folder / "train")
    for path in sorted((folder / "train").glob("*/*"))[::HELD_OUT]:
        target = folder / "val" / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)


def convert(name: str, sources: Sequence[Path], out: Path, *, every: int, workers: int) -> str:
    """Make the two files of a set and say what they hold."""
    made = set_of(name, out)
    folder = out / f"{name}.images"
    shutil.rmtree(folder, ignore_errors=True)
    unpacked = unpack(sources, folder, every=every)
    if len(unpacked) == 1:
        hold_out(folder)
    for split, file in (("train", made.train), ("val", made.val)):
        numbers = () if split == "train" else ("--classes-from", str(made.train))
        prep("write", "--mode", "passthrough", "--workers", str(workers), "--overwrite", *numbers, folder / split, file)
    shutil.rmtree(folder)
    return f"{unpacked.total()} images of {', '.join(source.name for source in sources)}"


def draw(name: str, out: Path) -> str:
    """Put the demo set in the place of a set."""
    made, folder = set_of(name, out), out / f"{name}.drawn"
    prep("demo", folder, "--overwrite")
    for split, file in (("train", made.train), ("val", made.val)):
        for suffix in ("", ".json"):  # the sidecar too: one of other images would be refused
            (folder / f"{split}.beton{suffix}").replace(f"{file}{suffix}")
    shutil.rmtree(folder)
    return f"the demo set: no {SETS[name]}*.tar* was carried"


def prep(*arguments: str | Path) -> None:
    """Run fastbyol-prep; raise CalledProcessError where it fails."""
    subprocess.run([sys.executable, "-m", "fastbyol.data_prep.cli", *map(str, arguments)], check=True)


def main() -> int:
    """Make every set that is not there yet; return 1 where one fails, after the others."""
    parser = argparse.ArgumentParser(prog="images.py", description=__doc__)
    parser.add_argument("--carried", type=Path, required=True, metavar="DIR", help="where the archives are")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--rows", type=Path, required=True, metavar="FILE")
    parser.add_argument("--facts", type=Path, required=True, metavar="FILE", help="the machine, for the rows")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take every n-th image of a class")
    parser.add_argument("--workers", type=int, required=True, metavar="N")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in SETS:
        sources, began = archives(args.carried, name), time.monotonic()
        key = f"{args.every} {[(source.name, source.stat().st_size) for source in sources]}"
        done = args.out / f"{name}.done"
        row = {"case": "images", "shape": name, "dtype": "", "implementation": "fastbyol-prep", "error": None}
        try:
            if done.exists() and done.read_text() == key:
                row["result"] = "there already"
            elif sources:
                row["result"] = convert(name, sources, args.out, every=args.every, workers=args.workers)
            else:
                row["result"] = draw(name, args.out)
            done.write_text(key)
        except (OSError, ValueError, tarfile.TarError, subprocess.CalledProcessError) as error:
            row["error"], failed = f"failed: {error}", True
        row["elapsed_s"] = round(time.monotonic() - began, 1)
        print(f"{name}: {row.get('result') or row['error']}, {row['elapsed_s']} s", flush=True)
        append_row(args.rows, row | json.loads(args.facts.read_text()))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
