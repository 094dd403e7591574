"""Laws of copies: the same bytes are exact ones; pictures that were scaled or encoded anew are near ones."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastbyol.beton import Reader
from fastbyol.data_prep import duplicates
from fastbyol.data_prep.cli import main
from tests.support.layouts import lay_out


def picture(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 7, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((140, 120), Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Write twenty pictures, a copy of the first under another name, and three near copies of the second."""
    files = {f"{seed:02}.png": saved(picture(seed)) for seed in range(20)}
    second = picture(1)
    files |= {
        "copy.png": files["00.png"],
        "jpeg.jpg": saved(second, "JPEG", quality=80),
        "small.png": saved(second.resize((70, 60), Image.Resampling.LANCZOS)),
        "bright.png": saved(second.point(lambda level: min(255, level + 6))),
    }
    assert main(["write", str(lay_out(tmp_path / "in", files)), str(tmp_path / "o.beton"), "--mode", "raw"]) == 0
    return tmp_path / "o.beton"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("exact", [["00.png", "copy.png"]]),
        ("near", [["00.png", "copy.png"], ["01.png", "bright.png", "jpeg.jpg", "small.png"]]),
    ],
)
def test_copies_are_listed_by_name(
    written: Path, kind: str, expected: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["info", str(written), "--duplicates", kind, "--json"]) == 0
    assert sorted(map(sorted, json.loads(capsys.readouterr().out))) == expected
    assert main(["info", str(written), "--duplicates", kind]) == 0
    first, *groups = capsys.readouterr().out.splitlines()
    assert first == f"{sum(map(len, expected)) - len(expected)} of 24 images are copies, of {len(expected)} others"
    assert len(groups) == len(expected)


def test_hashes_a_few_bits_apart_are_all_found(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    hashes = [int(value) for value in rng.integers(0, 2**63, 12)]
    hashes += [hashes[n] ^ sum(1 << int(bit) for bit in rng.choice(64, n % 5, replace=False)) for n in range(12)]
    monkeypatch.setattr(duplicates, "difference_hash", lambda _, index: hashes[index])
    with Reader(written) as reader:
        found = duplicates.near(reader)
    assert sorted(map(sorted, found)) == [[n, n + 12] for n in range(12) if n % 5 <= duplicates.BITS_APART]
