"""Fuzzer of damaged files: a clean error, or a read that is right. `python -m tests.support.fuzz --help`.

Runs as a process of its own, under a memory limit, with an alarm for each mutant; the number of the current one stands
in a file, so that a crash can be repeated: --first NUMBER --count 1.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg

from fastbyol.beton import JPEG, RAW, BetonError, Reader, StoredImage, sidecar_path
from fastbyol.data_prep.formats import load_plugin
from fastbyol.data_prep.images import ImageError, check_stored, prepare
from fastbyol.data_prep.info import describe, format_lines
from fastbyol.data_prep.pixels import silence_decoders
from fastbyol.data_prep.settings import Settings
from fastbyol.data_prep.verify import verify
from fastbyol.data_prep.writer import Writer
from tests.support.layouts import draw
from tests.support.mutate import PAGE, Anatomy, Patch, applied, mutate, mutate_sidecar

SEED = 20_000
HANG_S = 20
# Beyond what the imports take, of address space and of resident memory. Images of 40 px are read, and the size a record
# or a JPEG claims is compared before it is allocated; an image file to be stored may decode to 89 Mpx, in some steps.
ADDRESS_MIB = {"mutants": 1024, "payloads": 4096}
GROWTH_MIB = {"mutants": 64, "payloads": 2048}
VERIFY_EVERY = (
    25  # it starts threads and sums up 4 MiB; 25 and 3 have no common factor, so that every base has its turn
)
HAS_SIDECAR = 2  # the number of the base that has one


def write_base(path: Path, *, labelled: bool, has_sidecar: bool) -> Path:
    """Write a sound file of five images: JPEGs of several kinds, and raw."""
    names = ["a", "b"] if labelled else None
    with Writer(path, capacity=5, class_names=names, page_bytes=PAGE, overwrite=True) as writer:
        for number in range(5):
            settings = Settings("raw" if number == 2 else "jpeg" if number % 2 else "passthrough")
            writer.append(prepare(draw(number, side=40), settings), label=number % 2 if labelled else None)
    if not has_sidecar:
        sidecar_path(path).unlink()
    return path


def read(path: Path, *, is_verified: bool) -> str:
    """Read a file by every way there is; return what became of it, raise AssertionError for a wrong read."""
    try:
        with Reader(path) as reader:
            _require_sound_index(reader)
            outcomes = [_read_image(reader, index) for index in range(len(reader))]
            if is_verified:
                faults = list(verify(reader, workers=1))
                assert len(faults) >= outcomes.count("image error")
                assert all(line.isprintable() for line in [*format_lines(describe(reader)), *faults])
    except BetonError as error:
        _require_one_line(error)
        return "refused"
    return "image error" if "image error" in outcomes else "read"


def _require_one_line(error: Exception) -> None:
    """Hold a message to one line without control characters, which a damaged file could slip in."""
    assert str(error).isprintable(), repr(error)


def _require_sound_index(reader: Reader) -> None:
    """Hold what the reader says of places and sizes to the file's own words, read here once more without it."""
    with reader.path.open("rb") as stream:
        version, num_fields, page, count, table_ptr = struct.unpack("<HHIQQ", stream.read(24))
        stream.seek(table_ptr)
        table = {at: (sample, size) for sample, at, size in struct.iter_unpack("<QQQ", stream.read())}
    assert (version, len(reader)) == (2, count)
    spans = sorted(zip(reader.offsets.tolist(), reader.sizes.tolist(), strict=True))
    ends = [start + size for start, size in spans]
    assert all(end <= start for end, (start, _) in zip(ends, spans[1:], strict=False)), "images overlap"
    assert 24 + 1041 * num_fields + 13 * count <= spans[0][0], "an image lies in the index"
    assert ends[-1] <= table_ptr, "an image lies in the table"
    assert all(start // page == (start + size - 1) // page for start, size in spans), "an image crosses a page"
    for sample, (start, size) in enumerate(zip(reader.offsets.tolist(), reader.sizes.tolist(), strict=True)):
        assert table[start] == (sample, size), "an image of another sample"
    assert set(reader.modes.tolist()) <= {JPEG, RAW}
    if reader.labels is not None and reader.class_names is not None:
        assert all(0 <= label < len(reader.class_names) for label in reader.labels.tolist())


def _read_image(reader: Reader, index: int) -> str:
    """Read one image: what verify passes must decode, as a loader does it, to the size its record says."""
    payload = reader.payload(index)
    mode, height, width = int(reader.modes[index]), int(reader.heights[index]), int(reader.widths[index])
    assert 0 < len(payload) == reader.sizes[index]
    try:
        check_stored(payload, mode=mode, width=width, height=height)
    except ImageError as error:
        _require_one_line(error)
        return "image error"
    if mode == RAW:
        assert np.frombuffer(payload, np.uint8).reshape(height, width, 3).shape[2] == 3
    else:
        assert simplejpeg.decode_jpeg(payload, "RGB", strict=True).shape == (height, width, 3)
    return "read"


def mutants(folder: Path, current: Callable[[int], None], numbers: range) -> Counter[str]:
    """Read damaged .beton files; the kinds of base take turns."""
    bases = [
        write_base(folder / f"{labelled}-{has_sidecar}.beton", labelled=labelled, has_sidecar=has_sidecar)
        for labelled, has_sidecar in ((True, False), (False, False), (True, True))
    ]
    anatomies = [Anatomy(base) for base in bases]
    streams = [os.open(base, os.O_RDWR) for base in bases]
    sidecars = sidecar_path(bases[HAS_SIDECAR]).read_bytes()
    outcomes: Counter[str] = Counter()
    for number in numbers:
        current(number)
        kind = number % len(bases)
        rng = np.random.default_rng([SEED, number])
        patches, size = mutate(anatomies[kind], rng)
        if kind == HAS_SIDECAR:
            sidecar_path(bases[kind]).write_bytes(mutate_sidecar(sidecars, rng) if rng.random() < 0.7 else sidecars)
            patches, size = (patches, size) if rng.random() < 0.3 else ([], anatomies[kind].size)
        with applied(streams[kind], anatomies[kind], patches, size):
            outcomes[read(bases[kind], is_verified=number % VERIFY_EVERY == 0)] += 1
    sidecar_path(bases[HAS_SIDECAR]).write_bytes(sidecars)
    for base, anatomy in zip(bases, anatomies, strict=True):
        assert base.read_bytes() == anatomy.data, "every mutant was put right again"
        assert read(base, is_verified=True) == "read"
    return outcomes


def payloads(_folder: Path, current: Callable[[int], None], numbers: range) -> Counter[str]:
    """Store damaged image files, as write would; the formats take turns."""
    kinds = (
        "JPEG",
        "JPEG",
        "PNG",
        "WEBP",
        "BMP",
        "GIF",
        "TIFF",
        "PPM",
        "AVIF",
        "JPEG2000",
        "ICO",
        "TGA",
        "HEIF",
        "JXL",
    )
    for kind in kinds:
        load_plugin(kind)
    settings = [Settings("passthrough"), Settings("jpeg", max_side=30), Settings("raw"), Settings("proportion")]
    settings += [Settings(), Settings(stretch=(1, 99), keeps_damaged=True), Settings(max_side=10, max_pixels=300)]
    outcomes: Counter[str] = Counter()
    for number in numbers:
        current(number)
        rng = np.random.default_rng([SEED, number])
        kind = kinds[number % len(kinds)]
        data = bytearray(draw(number % 5, kind=kind, side=24))
        for place, patch in _damage(data, rng):
            data[place : place + len(patch)] = patch
        chosen = settings[int(rng.integers(len(settings)))]
        try:
            image = prepare(
                bytes(data[: len(data) if rng.random() < 0.8 else rng.integers(len(data))]), chosen, name=f"a.{kind}"
            )
        except ImageError as error:
            _require_one_line(error)
            outcomes[f"{kind} refused"] += 1
            continue
        _read_stored(image)
        outcomes[f"{kind} stored"] += 1
    return outcomes


def _damage(data: bytearray, rng: np.random.Generator) -> list[Patch]:
    """Choose bytes to change: in the headers more often than among the pixels."""
    count = int(rng.choice([1, 1, 2, 5]))
    ends = [
        min(len(data), 64) if rng.random() < 0.3 else min(len(data), 700) if rng.random() < 0.6 else len(data)
    ] * count
    return [
        (int(rng.integers(end)), bytes([int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.integers(256)]))])) for end in ends
    ]


def _read_stored(image: StoredImage) -> None:
    """Hold what store returned to what its record will say."""
    if image.mode == JPEG:
        check_stored(image.data, mode=JPEG, width=image.width, height=image.height)
        assert simplejpeg.decode_jpeg(image.data, "RGB", strict=True).shape == (image.height, image.width, 3)
    else:
        assert len(image.data) == 3 * image.width * image.height


def _status(key: str) -> int:
    """Return a figure of this process's memory in MiB."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) >> 10


def main() -> None:
    """Run one suite over a range of mutants; print what became of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", choices=["mutants", "payloads"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, required=True)
    arguments = parser.parse_args()
    place = os.open(arguments.folder / "current", os.O_WRONLY | os.O_CREAT)

    def current(number: int) -> None:
        os.pwrite(place, b"%-20d" % number, 0)
        signal.setitimer(signal.ITIMER_REAL, HANG_S)  # SIGALRM ends the process

    silence_decoders()
    run = {"mutants": mutants, "payloads": payloads}[arguments.suite]
    numbers = range(arguments.first, arguments.first + arguments.count)
    warm = range(numbers.start, numbers.start + 1)
    run(arguments.folder, current, warm)
    limit = _status("VmSize") + ADDRESS_MIB[arguments.suite] << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before = _status("VmHWM")
    for outcome, count in sorted(run(arguments.folder, current, numbers).items()):
        print(f"{outcome}: {count}")
    assert _status("VmHWM") - before < GROWTH_MIB[arguments.suite], "memory grew"


if __name__ == "__main__":
    main()
