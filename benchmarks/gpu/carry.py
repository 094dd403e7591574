"""python benchmarks/gpu/carry.py [ARCHIVE ...]: what travels beside the tree, and whether it fits.

Makes the folder carried/ (ignored by git) with the archives of images given, the wheels a bare machine lacks, the
commit and, with --failed, the tests that failed in the call before. All that travels, the tree included, is at most
64 MiB: archives and simplejpeg must fit, the other wheels are left out where they do not.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT_BYTES = 64 * 2**20
WHEELS = ("simplejpeg", "nvidia-nvjpeg", "nvidia-cudnn-frontend")  # by importance
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")
DOWNLOAD_S = 120.0


class TooLarge(Exception):
    """The files that must travel do not fit."""


def tree_bytes(root: Path) -> int:
    """Count the bytes of the files that git tracks or would track; raise FileNotFoundError without a repository."""
    if not (root / ".git").exists():
        raise FileNotFoundError(f"{root} is no git repository: make the carried folder where the tree is checked out")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=root, capture_output=True, check=True).stdout.split(b"\0")
    paths = [root / name.decode() for name in set(names) if name]
    return sum(path.lstat().st_size for path in paths if path.is_symlink() or path.is_file())


def chosen(
    tree: int, required: Sequence[Path], optional: Sequence[Path], *, limit: int
) -> tuple[list[Path], list[str]]:
    """Choose the files that travel: all that are required, then what fits of the others, in their order.

    Returns them and a line for each that stays. Raises TooLarge, with every size, where the required do not fit.
    """
    used = tree + sum(path.stat().st_size for path in required)
    if used > limit:
        sizes = ", ".join(f"{path.name} {path.stat().st_size}" for path in required)
        raise TooLarge(
            f"{used} bytes do not travel, {limit} do: the tree {tree}, {sizes}; drop {used - limit} bytes, "
            f"such as {max(required, key=lambda path: path.stat().st_size, default=Path('the tree')).name}"
        )
    taken, left = list(required), []
    for path in optional:
        size = path.stat().st_size
        if used + size <= limit:
            taken.append(path)
            used += size
        else:
            left.append(f"left out: {path.name}, {size} bytes, {used + size - limit} too many")
    return taken, left


def download(name: str, folder: Path) -> Path | str:
    """Fetch a wheel for CPython 3.12 on x86-64, without what it depends on; return it, or why it did not come."""
    into = folder / name
    platforms = [word for platform in PLATFORMS for word in ("--platform", f"{platform}_x86_64")]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp", *platforms]
    try:
        done = subprocess.run(
            [*command, "--dest", str(into), name], capture_output=True, text=True, timeout=DOWNLOAD_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"pip took more than {DOWNLOAD_S:.0f} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["pip says nothing"])[-1]
    (wheel,) = into.glob("*.whl")
    return wheel


def make(
    out: Path, archives: Sequence[Path], wheels: Sequence[Path], notes: Sequence[Path], *, limit: int
) -> list[str]:
    """Fill the folder anew and list what is in it and what is not; the tree's own files are counted first."""
    first, others = [w for w in wheels if w.name.startswith(WHEELS[0])], [w for w in wheels if WHEELS[0] not in w.name]
    tree = tree_bytes(ROOT)
    taken, left = chosen(tree, [*notes, *archives, *first], others, limit=limit)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for path in taken:
        shutil.copyfile(path, out / path.name)
    total = tree + sum(path.stat().st_size for path in out.iterdir())
    lines = [f"{path.stat().st_size:>10}  {path.name}" for path in sorted(out.iterdir())]
    return [f"{tree:>10}  the tree", *lines, f"{total:>10}  of {limit} together", *left]


def main() -> int:
    """Make the folder; return 2 where something given is missing or does not fit."""
    parser = argparse.ArgumentParser(prog="carry.py", description=__doc__)
    parser.add_argument("archives", nargs="*", type=Path, metavar="ARCHIVE.tar[.gz|.xz]", help="cifar10*, imagenet*")
    parser.add_argument("--out", type=Path, default=ROOT / "carried", metavar="DIR")
    parser.add_argument("--failed", type=Path, metavar="FILE", help="failed.txt of the call before")
    parser.add_argument("--no-wheels", action="store_true", help="fetch nothing")
    args = parser.parse_args()
    missing = [str(path) for path in (*args.archives, *filter(None, [args.failed])) if not path.is_file()]
    if missing:
        print(f"carry.py: error: no file {', '.join(missing)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        found = {} if args.no_wheels else {name: download(name, scratch) for name in WHEELS}
        notes = [scratch / "commit.txt"]
        describe = ["git", "describe", "--always", "--dirty"]
        notes[0].write_text(subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=False).stdout)
        if args.failed:
            notes.append(scratch / "failed.txt")
            shutil.copyfile(args.failed, notes[1])
        try:
            wheels = [wheel for wheel in found.values() if isinstance(wheel, Path)]
            lines = make(args.out, args.archives, wheels, notes, limit=LIMIT_BYTES)
        except (TooLarge, OSError) as error:
            print(f"carry.py: error: {error}", file=sys.stderr)
            return 2
    print("\n".join(lines))
    for name, why in found.items():
        if isinstance(why, str):
            print(f"not fetched: {name}: {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
