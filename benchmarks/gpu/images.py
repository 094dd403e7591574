"""Image sets of a call: carried archives unpacked and converted by fastbyol-prep, or the demo set in their place.

A set is a training file and a validation file, SET.train.beton and SET.val.beton. Where an archive holds one split
alone, every fifth image of it becomes the validation file. Of `photographs`, which show what decoding costs, there is a
training file alone: each image twenty times, in the size that fastbyol-prep gives ImageNet's.
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

from benchmarks import quality
from benchmarks.gpu.output import append_row

# a set's name, and how its archives' names begin
DIVIDED = "cifar10-held-out"  # CIFAR-10's training images divided, to learn from and to choose by
SETS = {"cifar10": "cifar", DIVIDED: "cifar", "imagenette": "imagenette", "photographs": "imagenet-"}
SPLITS = {"train": "train", "val": "val", "test": "val"}
HELD_OUT = 5
COPIES = 20  # of each photograph: a hundred of them make three batches of 512
IMAGES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Set:
    """Name the two files of a set of images."""

    train: Path
    val: Path


def set_of(name: str, folder: Path) -> Set:
    """Return the paths of the files of a set."""
    if name == DIVIDED:
        return Set(folder / DIVIDED / "learn.beton", folder / DIVIDED / "held.beton")
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


def copy(sources: Sequence[Path], folder: Path) -> int:
    """Write every image of the archives to folder/0 .. folder/19, as links to one file; return how many there are."""
    names: list[str] = []
    for source in sources:
        with tarfile.open(source) as archive:
            for member in archive:
                if member.isfile() and member.name.lower().endswith(IMAGES):
                    file = archive.extractfile(member)
                    assert file is not None
                    names.append(PurePosixPath(member.name).name)
                    for number in range(COPIES):
                        target = folder / str(number) / names[-1]
                        target.parent.mkdir(parents=True, exist_ok=True)
                        if number:
                            target.hardlink_to(folder / "0" / names[-1])
                        else:
                            target.write_bytes(file.read())
    if not names:
        raise ValueError(f"{', '.join(map(str, sources))}: no image")
    return len(names)


def convert_copies(sources: Sequence[Path], out: Path, *, workers: int) -> str:
    """Make the training file of `photographs` and say what it holds."""
    folder = out / "photographs.images"
    shutil.rmtree(folder, ignore_errors=True)
    count = copy(sources, folder)
    prep("write", "--workers", str(workers), "--overwrite", folder, set_of("photographs", out).train)
    shutil.rmtree(folder)
    return f"{count} images of {', '.join(source.name for source in sources)}, {COPIES} times"


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
    """Put the demo set in the place of a set; it is drawn once for all sets."""
    made, folder = set_of(name, out), out / "drawn"
    if not (folder / "val.beton.json").exists():  # the last that is written
        prep("demo", folder, "--overwrite")
    for split, file in (("train", made.train), ("val", made.val)):
        for suffix in ("", ".json"):  # the sidecar too: one of other images would be refused
            link = Path(f"{file}{suffix}")
            link.unlink(missing_ok=True)
            link.hardlink_to(folder / f"{split}.beton{suffix}")
    return f"the demo set: no {SETS[name]}*.tar* was carried"


def prep(*arguments: str | Path) -> None:
    """Run fastbyol-prep; raise CalledProcessError where it fails."""
    subprocess.run([sys.executable, "-m", "fastbyol.data_prep.cli", *map(str, arguments)], check=True)


def main() -> int:
    """Make every set asked for that is not there yet; return 1 where one fails, after the others."""
    parser = argparse.ArgumentParser(prog="images.py", description=__doc__)
    parser.add_argument("--carried", type=Path, required=True, metavar="DIR", help="where the archives are")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--rows", type=Path, required=True, metavar="FILE")
    parser.add_argument("--facts", type=Path, required=True, metavar="FILE", help="the machine, for the rows")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take every n-th image of a class")
    parser.add_argument("--workers", type=int, required=True, metavar="N")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS, help="default: all")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in args.sets:
        sources, began = archives(args.carried, name), time.monotonic()
        key = f"{args.every} {[(source.name, source.stat().st_size) for source in sources]}"
        done = args.out / f"{name}.done"
        row = {"case": "images", "shape": name, "dtype": "", "implementation": "fastbyol-prep", "error": None}
        try:
            if done.exists() and done.read_text() == key:
                row["result"] = "there already"
            elif name == DIVIDED:
                shutil.rmtree(args.out / DIVIDED, ignore_errors=True)  # of other images
                quality.hold_out(set_of("cifar10", args.out).train, args.out / DIVIDED)
                row["result"] = "every class of cifar10's training images divided"
            elif sources and name == "photographs":
                row["result"] = convert_copies(sources, args.out, workers=args.workers)
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
