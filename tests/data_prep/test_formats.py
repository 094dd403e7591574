"""Laws of formats: the content decides, every format that is named is read, deep gray is mapped as asked."""

from __future__ import annotations

import importlib
import io
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastbyol.beton import RAW, Reader
from fastbyol.data_prep.cli import main
from fastbyol.data_prep.formats import SUFFIXES, format_of
from fastbyol.data_prep.images import ImageError, prepare
from fastbyol.data_prep.settings import Settings
from fastbyol.data_prep.sources import open_source
from tests.support.layouts import lay_out

RAW_ALL = Settings(mode="raw")
SAVED = {  # Pillow's format by suffix, where it can write it
    "jpg": "JPEG", "jfif": "JPEG", "mpo": "MPO", "png": "PNG", "apng": "PNG", "webp": "WEBP", "bmp": "BMP",
    "dib": "DIB", "gif": "GIF", "tif": "TIFF", "ppm": "PPM", "pgm": "PPM", "pbm": "PPM", "avif": "AVIF",
    "jp2": "JPEG2000", "j2k": "JPEG2000", "tga": "TGA", "ico": "ICO",
}  # fmt: skip


def saved(suffix: str, image: Image.Image) -> bytes:
    stream = io.BytesIO()
    options = {"no_jp2": True} if suffix == "j2k" else {}
    image.convert({"pgm": "L", "pbm": "1"}.get(suffix, "RGB")).save(stream, SAVED[suffix], **options)
    return stream.getvalue()


def picture() -> Image.Image:
    y, x = np.mgrid[0:32, 0:32]
    return Image.fromarray(np.stack([8 * x, 8 * y, 4 * (x + y)], axis=2).astype(np.uint8))


@pytest.mark.parametrize("suffix", SAVED)
def test_every_format_is_read_as_pillow_reads_it(suffix: str) -> None:
    data = saved(suffix, picture())
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    image = prepare(data, RAW_ALL, name=f"a.{suffix}")
    assert np.array_equal(np.frombuffer(image.data, np.uint8).reshape(expected.shape), expected)


def test_a_folder_of_all_suffixes_is_taken_whole(tmp_path: Path) -> None:
    files = {f"{'ab'[number % 2]}/{number}.{suffix}": saved(suffix, picture()) for number, suffix in enumerate(SAVED)}
    files |= {f"a/upper.{suffix.upper()}": saved(suffix, picture()) for suffix in ("jpg", "avif", "jp2")}
    assert main(["write", str(lay_out(tmp_path / "in", files)), str(tmp_path / "o.beton")]) == 0
    with Reader(tmp_path / "o.beton") as reader:
        assert len(reader) == len(files)
    assert {f".{suffix}" for suffix in SAVED} < SUFFIXES


def test_the_content_decides_not_the_name(tmp_path: Path) -> None:
    source = open_source(lay_out(tmp_path, {"a.png": saved("jpg", picture()), "b.jpg": saved("png", picture())}))
    assert [prepare(sample.read(), RAW_ALL, name=sample.name).mode for sample in source] == [RAW, RAW]
    assert format_of(b"not an image at all") is None
    assert format_of(b"not an image at all", "x.tga") == "TGA"
    with pytest.raises(ImageError, match="damaged TGA"):
        prepare(b"not an image at all", RAW_ALL, name="x.tga")


@pytest.mark.parametrize(("kind", "module", "extra"), [("HEIF", "pillow_heif", "heif"), ("JXL", "pillow_jxl", "jxl")])
def test_formats_of_other_packages_are_read_or_the_package_is_named(
    kind: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin, stream = importlib.import_module(module), io.BytesIO()
    if kind == "HEIF":
        plugin.register_heif_opener()
    picture().save(stream, kind)
    image = prepare(stream.getvalue(), RAW_ALL)
    decoded = np.frombuffer(image.data, np.uint8).reshape(32, 32, 3)
    assert np.abs(decoded.astype(int) - np.asarray(picture())).mean() < 4
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImageError, match=rf"{kind} needs a package .*pip install 'fastbyol.{extra}.'"):
        prepare(stream.getvalue(), RAW_ALL)


def gray_tiff(levels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    is_unsigned = levels.dtype == np.uint32  # which Pillow does not write: it is the same with another sample format
    Image.fromarray(levels.view(np.int32) if is_unsigned else levels).save(stream, "TIFF")
    signed, unsigned = (struct.pack("<HHIH", 339, 3, 1, kind) for kind in (2, 1))
    return stream.getvalue().replace(signed, unsigned) if is_unsigned else stream.getvalue()


def test_sixteen_bit_pgm_spans_the_range() -> None:
    levels = np.arange(0, 65536, 16).reshape(64, 64)
    image = prepare(b"P5 64 64 65535\n" + levels.astype(">u2").tobytes(), RAW_ALL)
    found = np.frombuffer(image.data, np.uint8).reshape(64, 64, 3)[..., 0]
    assert np.abs(found.astype(int) - levels / 257).max() <= 0.5


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "GIF"])
def test_a_cut_file_of_any_format_is_kept_and_listed_only_if_asked(kind: str, tmp_path: Path) -> None:
    stream = io.BytesIO()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8))
    noise.save(stream, kind)
    whole = stream.getvalue()
    lay_out(tmp_path / "in", {"cut.png": whole[: len(whole) // 2], "whole.png": whole})
    write = ["write", str(tmp_path / "in"), str(tmp_path / "o.beton"), "--overwrite", "--on-error"]
    for on_error, status, count in (("fail", 2, 0), ("skip", 0, 1), ("keep", 0, 2)):
        assert main([*write, on_error]) == status
        if status == 0:
            with Reader(tmp_path / "o.beton") as reader:
                assert len(reader) == count
                listed = reader.sidecar["repaired" if on_error == "keep" else "skipped"]
                assert [fact["name"] for fact in listed] == ["cut.png"]


def test_a_photograph_of_200_megapixels_with_exif_is_scaled() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.new("RGB", (16320, 12240), (9, 99, 199)).save(stream, "JPEG", exif=exif)
    image = prepare(stream.getvalue(), Settings(mode="raw", max_side=64))
    assert (image.width, image.height) == (48, 64)


def stored_gray(levels: np.ndarray, settings: Settings) -> np.ndarray:
    image = prepare(gray_tiff(levels), settings)
    return np.frombuffer(image.data, np.uint8).reshape(*levels.shape, 3)[..., 0]


def test_deep_gray_is_linear_or_stretched_between_percentiles() -> None:
    ramp = np.linspace(0.0, 1.0, 64 * 64, dtype=np.float32).reshape(64, 64)
    assert np.array_equal(stored_gray(ramp, RAW_ALL), (ramp.astype(float) * 255 + 0.5).astype(np.uint8))
    ints = (ramp.astype(np.float64) * (2**31 - 1)).astype(np.int32)
    assert np.abs(stored_gray(ints, RAW_ALL).astype(int) - ramp * 255).max() <= 1
    unsigned = (ramp.astype(np.float64) * (2**32 - 1)).astype(np.uint32)
    assert np.abs(stored_gray(unsigned, RAW_ALL).astype(int) - ramp * 255).max() <= 1
    assert stored_gray(unsigned, Settings(mode="raw", stretch=(0, 100))).max() == 255
    shifted = 1000 * ramp - 500
    whole = stored_gray(shifted, Settings(mode="raw", stretch=(0, 100)))
    assert (whole.min(), whole.max()) == (0, 255)
    assert np.abs(whole.astype(int) - ramp * 255).max() <= 1
    inner = stored_gray(shifted, Settings(mode="raw", stretch=(25, 75)))
    assert (inner == 0).mean() == pytest.approx(0.25, abs=0.01)
    assert (inner == 255).mean() == pytest.approx(0.25, abs=0.01)
    assert not stored_gray(np.full((8, 8), 7.0, np.float32), Settings(mode="raw", stretch=(0, 100))).any()


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        (np.full((8, 8), 300.0, np.float32), "from 300 to 300, wanted 0 to 1; give --stretch"),
        (np.full((8, 8), np.nan, np.float32), "inf or NaN"),
        (np.full((8, 8), -5, np.int32), "from -5 to -5, wanted 0 to 2.14748e.09; give --stretch"),
        (np.full((8, 8), 4095, np.int32), "up to 4095, which are black beside .*give --stretch"),
    ],
)
def test_gray_that_would_be_lost_is_an_error(levels: np.ndarray, expected: str) -> None:
    with pytest.raises(ImageError, match=expected):
        prepare(gray_tiff(levels), RAW_ALL)


def test_a_fourth_channel_that_is_no_alpha_is_an_error() -> None:
    image, stream = Image.new("RGBA", (8, 8), (10, 20, 30, 255)), io.BytesIO()
    image.save(stream, "TIFF")
    assert prepare(stream.getvalue(), RAW_ALL).data[:3] == bytes([10, 20, 30])
    for extra in (0, None):
        data = bytearray(stream.getvalue())
        place = data.index((338).to_bytes(2, "little"))
        if extra is None:
            data[place : place + 2] = (65000).to_bytes(2, "little")  # a private tag in its place
        else:
            data[place + 8 : place + 10] = extra.to_bytes(2, "little")
        with pytest.raises(ImageError, match="4 channels, which are neither CMYK nor RGB with alpha"):
            prepare(bytes(data), RAW_ALL)


def test_libtiff_prints_nothing_of_its_own(tmp_path: Path) -> None:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64)).astype(np.uint8)
    Image.fromarray(noise).save(stream, "TIFF", compression="tiff_lzw")
    damaged = stream.getvalue()[:20] + bytes(range(100)) + stream.getvalue()[120:]
    lay_out(tmp_path / "in", {"0.jpg": saved("jpg", picture()), "1.tif": damaged})
    command = [sys.executable, "-m", "fastbyol.data_prep.cli", "write", tmp_path / "in", tmp_path / "o.beton"]
    done = subprocess.run([*command, "--on-error", "skip"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "skipped 1 bad images" in done.stdout
