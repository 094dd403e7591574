"""Laws of the images: every kind of file becomes the pixels an independent definition says, damage is always caught."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fastbyol.beton import JPEG, RAW
from fastbyol.data_prep.images import ImageError, check_stored, prepare, shrink, upright
from fastbyol.data_prep.settings import PIXELS_MAX, Settings, SettingsError
from tests.support.tolerances import BINOMIAL_SIGMAS

Pixels = NDArray[np.uint8]
ANY: dict[str, Any] = {"side": 100, "is_lossless": False}  # of which mode proportion takes no notice
RAW_ALL = Settings(mode="raw", max_side=2000)
PASS = Settings(mode="passthrough", max_side=500)
# Two JPEG decoders may round differently in the inverse DCT and the upsampling; libjpeg-turbo against itself does not.
SAME_DECODER = 0


def smooth(height: int = 48, width: int = 64) -> Pixels:
    """Draw an image that JPEG keeps well and that no flip or turn leaves as it is."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = 255 * x / (width - 1), 255 * y / (height - 1)
    return np.stack([red, green, (red + green) / 3], axis=2).round().astype(np.uint8)


def save(pixels: NDArray[Any] | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def load(data: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(data)))


def stored_pixels(data: bytes, settings: Settings = RAW_ALL) -> Pixels:
    image = prepare(data, settings)
    assert image.mode == RAW
    return np.frombuffer(image.data, np.uint8).reshape(image.height, image.width, 3)


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """Write a PNG from unfiltered big-endian samples: Pillow cannot write 16-bit colour."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    step = len(rows) // height
    lines = b"".join(b"\0" + rows[start : start + step] for start in range(0, len(rows), step))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_colour_is_exact(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(stored_pixels(save(smooth(), kind, **options)), smooth())


def test_sixteen_bit_gray_spans_the_range() -> None:
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.floor(levels / 65535 * 255 + 0.5).astype(np.uint8)
    assert np.array_equal(stored_pixels(save(levels)), np.repeat(expected[..., None], 3, axis=2))
    assert np.array_equal(stored_pixels(save(levels, "TIFF")), np.repeat(expected[..., None], 3, axis=2))


def test_sixteen_bit_colour_is_within_one_level() -> None:
    levels = np.random.default_rng(0).integers(0, 65536, (20, 30, 3)).astype(">u2")
    got = stored_pixels(png(30, 20, 16, 2, levels.tobytes()))
    assert np.abs(got - levels.astype(np.float64) / 257).max() <= 1


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_few_bit_gray_spans_the_range(depth: int) -> None:
    rows = np.random.default_rng(0).bytes(8 * depth)
    bits = np.unpackbits(np.frombuffer(rows, np.uint8)).reshape(8, 8, depth)
    levels = (bits * (1 << np.arange(depth)[::-1])).sum(2)
    expected = levels * 255 // ((1 << depth) - 1)
    assert np.array_equal(stored_pixels(png(8, 8, depth, 0, rows))[..., 0], expected)


def test_gray_becomes_three_equal_channels() -> None:
    gray = smooth()[..., 0]
    expected = np.repeat(gray[..., None], 3, axis=2)
    assert np.array_equal(stored_pixels(save(gray)), expected)
    jpeg = save(gray, "JPEG", quality=95)
    assert np.array_equal(stored_pixels(jpeg), np.repeat(load(jpeg)[..., None], 3, axis=2))


def test_palette_is_looked_up() -> None:
    palette = np.random.default_rng(0).integers(0, 256, (256, 3)).astype(np.uint8)
    index = np.random.default_rng(1).integers(0, 256, (20, 30)).astype(np.uint8)
    image = Image.fromarray(index, "L").convert("P")
    image.putdata(index.ravel().tolist())
    image.putpalette(palette.tobytes())
    assert np.array_equal(stored_pixels(save(image)), palette[index])
    transparent = palette[index].copy()
    transparent[index == 7] = 255
    assert np.array_equal(stored_pixels(save(image, transparency=7)), transparent)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_over_white(mode: str) -> None:
    rng = np.random.default_rng(0)
    layer = rng.integers(0, 256, (20, 30, len(mode))).astype(np.uint8)
    colour, alpha = layer[..., :-1].astype(float), layer[..., -1:] / 255
    expected = colour * alpha + 255 * (1 - alpha)
    got = stored_pixels(save(Image.fromarray(layer, mode)))
    assert np.abs(got - expected).max() <= 1


def test_colour_key_is_transparent() -> None:
    image = smooth()
    expected = image.copy()
    expected[(image == image[3, 4]).all(2)] = 255
    assert np.array_equal(stored_pixels(save(image, transparency=tuple(image[3, 4].tolist()))), expected)


INKS = {
    (255, 0, 0, 0): (0, 255, 255),
    (0, 255, 0, 0): (255, 0, 255),
    (0, 0, 0, 255): (0, 0, 0),
    (0, 0, 0, 0): (255,) * 3,
}


@pytest.mark.parametrize("ink", INKS)
@pytest.mark.parametrize("is_adobe", [True, False], ids=["Adobe inverted", "plain"])
def test_cmyk_ink_darkens(ink: tuple[int, int, int, int], is_adobe: bool) -> None:
    # Pillow stores 255 - ink and marks the file Adobe; without the marker the stored numbers are the ink itself.
    shown = ink if is_adobe else tuple(255 - part for part in ink)
    data = save(Image.new("CMYK", (16, 16), shown), "JPEG", quality=100)
    if not is_adobe:
        at = data.index(b"\xff\xee")
        data = data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]
    got = stored_pixels(data)
    assert np.abs(got.astype(int) - np.array(INKS[ink])).max() <= 2


def test_cmyk_photo_agrees_with_pillow() -> None:
    ink = np.concatenate([255 - smooth(), smooth()[..., 2:] // 3], axis=2)
    data = save(Image.fromarray(ink, "CMYK"), "JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.abs(stored_pixels(data).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_undone(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(smooth(), kind, exif=exif, quality=95, lossless=True)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    got = stored_pixels(data)
    assert got.shape == expected.shape
    assert np.abs(got.astype(int) - expected).max() <= SAME_DECODER


def test_orientations_are_the_eight_symmetries() -> None:
    # Where EXIF (CIPA DC-008, tag 274) shows the pixel stored first, as (row, column) of the upright image.
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    image = smooth()
    for orientation, place in corner.items():
        turned = upright(image, orientation)
        assert np.array_equal(turned[place], image[0, 0])
        assert (turned.shape == image.shape) == (orientation <= 4)
    for orientation in (0, 9, 255):
        assert upright(image, orientation) is image


@pytest.mark.parametrize(
    ("size", "expected"), [((1000, 600), (500, 300)), ((3, 1400), (1, 500)), ((500, 499), (500, 499))]
)
def test_longest_side_is_capped_never_enlarged(size: tuple[int, int], expected: tuple[int, int]) -> None:
    for mode in ("jpeg", "raw", "passthrough"):
        data = save(smooth(size[1], size[0]), "JPEG")
        image = prepare(data, Settings(mode=mode, max_side=500))
        assert (image.width, image.height) == expected
        check_stored(image.data, mode=image.mode, width=image.width, height=image.height)


def test_shrinking_keeps_a_ramp() -> None:
    small = shrink(smooth(400, 600), 60).astype(float)
    expected = smooth(400, 600).astype(float).reshape(40, 10, 60, 10, 3).mean((1, 3))
    assert np.abs(small - expected)[2:-2, 2:-2].max() < 1.5


def test_shrunk_to_one_pixel_still_stores() -> None:
    image = prepare(save(smooth()), Settings(mode="jpeg", max_side=1))
    assert (image.width, image.height) == (1, 1)
    check_stored(image.data, mode=JPEG, width=1, height=1)


def test_jpeg_mode_is_close_to_the_original() -> None:
    image = prepare(save(smooth()), Settings(mode="jpeg", quality=95))
    assert image.mode == JPEG
    assert np.abs(load(image.data).astype(int) - smooth()).mean() < 2
    assert simplejpeg.decode_jpeg_header(image.data)[2:] == ("YCbCr", "420")


@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_passthrough_keeps_plain_jpegs_byte_for_byte(subsampling: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = 1
    for options in ({}, {"exif": exif}, {"comment": b"kept"}, {"optimize": True}):
        data = save(smooth(480, 500), "JPEG", subsampling=subsampling, **options)
        assert prepare(data, PASS).data == data
    assert prepare(data + b"trailing bytes", PASS).data == data + b"trailing bytes"


def test_passthrough_leaves_out_the_data_of_makers_and_the_images_behind_it() -> None:
    exif = Image.Exif()
    exif[0x0112] = 1
    plain = save(smooth(), "JPEG", exif=exif, icc_profile=b"profile", comment=b"kept")
    preview = save(smooth(8, 8), "JPEG")
    start = plain.index(b"\xff\xdb")
    for marker, body in ((0xE2, b"MPF\0" + preview), (0xE4, preview), (0xE7, b"DJI"), (0xEF, b"")):
        segment = bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body
        for made in (plain[:start] + segment + plain[start:], plain[:2] + segment * 2 + plain[2:]):
            assert prepare(made, PASS).data == plain
            assert prepare(made + preview, PASS).data == plain


def not_plain() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "progressive": save(smooth(), "JPEG", progressive=True),
        "gray": save(smooth()[..., 0], "JPEG"),
        "CMYK": save(Image.new("CMYK", (20, 20)), "JPEG"),
        "turned": save(smooth(), "JPEG", exif=exif),
        "too large": save(smooth(10, 501), "JPEG"),
        "PNG": save(smooth()),
    }


@pytest.mark.parametrize("name", not_plain())
def test_passthrough_encodes_the_rest(name: str) -> None:
    data = not_plain()[name]
    image = prepare(data, PASS)
    assert image.data == prepare(data, Settings(mode="jpeg", max_side=500)).data
    assert image.data != data
    header = Image.open(io.BytesIO(image.data))
    assert (header.mode, "progressive" in header.info) == ("RGB", False)


@pytest.mark.parametrize("settings", [Settings(), Settings(mode="raw"), PASS], ids=lambda settings: settings.mode)
def test_any_cut_of_a_jpeg_is_caught(settings: Settings) -> None:
    data = save(smooth(), "JPEG", quality=95)
    for size in (*range(0, len(data) - 2, 37), len(data) - 2, len(data) - 1):
        with pytest.raises(ImageError):
            prepare(data[:size], settings)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_cut_of_another_image_is_caught(kind: str) -> None:
    data = save(smooth(), kind)
    pixels_end = data.rindex(b"IEND") - 4 if kind == "PNG" else len(data) - 2
    for size in range(0, pixels_end, 41):
        if kind == "TIFF" and size > len(data) - 200:  # the directory lies behind the pixels
            continue
        with pytest.raises(ImageError):
            prepare(data[:size], RAW_ALL)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_flipped_bits_give_an_image_or_an_image_error(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {} if kind in ("BMP", "GIF") else {"exif": exif}
    data = save(smooth(), kind, **options)
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(data)
        # Headers are where decoders go wrong: half of the flips lie in the first 100 bytes.
        for place in (rng.integers(100), rng.integers(len(data)))[: rng.integers(1, 3)]:
            damaged[place] ^= 1 << rng.integers(8)
        try:
            image = prepare(bytes(damaged), RAW_ALL)
        except ImageError:
            continue
        assert len(image.data) == 3 * image.width * image.height


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", b"\xff\xd8\xff\xd9", b"hello", b"\xff\xd8" + b"\xff" * 1000, b"%!PS-Adobe"]
)
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(ImageError):
        prepare(data, Settings())


def test_bombs_are_refused_before_they_are_decoded() -> None:
    side = 40_000
    assert side * side > PIXELS_MAX
    with pytest.raises(ImageError, match="bomb"):
        prepare(png(side, side, 8, 2, b"\0" * side), Settings())
    data = bytearray(save(smooth(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    with pytest.raises(ImageError, match="bomb"):
        prepare(bytes(data), Settings())
    with pytest.raises(ImageError, match="bomb"):
        prepare(save(Image.new("1", (PIXELS_MAX // 1000 + 1, 1000))), Settings())


def test_check_compares_with_the_record() -> None:
    data = save(smooth(), "JPEG")
    check_stored(memoryview(data), mode=JPEG, width=64, height=48)
    with pytest.raises(ImageError, match="64x48, its record has 48x64"):
        check_stored(data, mode=JPEG, width=48, height=64)
    with pytest.raises(ImageError, match="damaged"):
        check_stored(data[:-9], mode=JPEG, width=64, height=48)
    with pytest.raises(ImageError, match="not a JPEG"):
        check_stored(save(smooth()), mode=JPEG, width=64, height=48)


def test_check_refuses_what_loaders_cannot_decode() -> None:
    data = save(Image.new("CMYK", (20, 10)), "JPEG")
    with pytest.raises(ImageError, match="4 components; loaders decode gray and colour"):
        check_stored(data, mode=JPEG, width=20, height=10)
    check_stored(save(smooth()[..., 0], "JPEG"), mode=JPEG, width=64, height=48)


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "png"},
        {"max_side": 0},
        {"max_side": 65536},
        {"quality": 0},
        {"quality": 101},
        {"jpeg_share": 0.5},
        {"mode": "proportion", "jpeg_share": 1.01},
        {"mode": "proportion", "jpeg_share": float("nan")},
    ],
)
def test_settings_are_checked(changes: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="give"):
        Settings(**changes)


@pytest.mark.parametrize(("max_side", "page_mib"), [(500, 8), (1672, 8), (1673, 16), (4000, 64), (65535, 256)])
def test_page_holds_the_largest_raw_image(max_side: int, page_mib: int) -> None:
    assert Settings(mode="raw", max_side=max_side).page_bytes == page_mib << 20


def test_proportion_stores_what_its_two_modes_store() -> None:
    mix, raws = Settings(mode="proportion", max_side=30), 0
    for number in range(40):
        data = save(smooth(40 + number, 60))
        image = prepare(data, mix)
        raws += image.mode == RAW
        assert image == prepare(data, Settings(mode="raw" if image.mode == RAW else "jpeg", max_side=30))
        assert (image.width, image.height) == (30, round(30 * (40 + number) / 60)) or number >= 20
    assert 0 < raws < 40


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_share_of_jpegs_is_the_share_asked_for(share: float) -> None:
    mix = Settings(mode="proportion", jpeg_share=share)
    count = 10_000
    jpegs = sum(not mix.wants_raw(number.to_bytes(4, "little"), **ANY) for number in range(count))
    assert abs(jpegs - share * count) <= BINOMIAL_SIGMAS * (count * share * (1 - share)) ** 0.5


def test_a_larger_share_keeps_every_jpeg() -> None:
    small, large = (Settings(mode="proportion", jpeg_share=share) for share in (0.3, 0.6))
    for number in range(1000):
        data = number.to_bytes(4, "little")
        assert small.wants_raw(data, **ANY) or not large.wants_raw(data, **ANY)


def test_passthrough_meets_every_fault_a_full_decode_meets() -> None:
    data = save(smooth(200, 300), "JPEG", quality=90)
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(300):
        damaged = bytearray(data)
        for place in rng.integers(600, len(data), rng.integers(1, 4)):
            damaged[place] ^= 1 << rng.integers(8)
        refused = [is_refused(bytes(damaged), settings) for settings in (PASS, RAW_ALL)]
        assert refused[0] == refused[1]
        outcomes.add(refused[0])
    assert outcomes == {False, True}


def is_refused(data: bytes, settings: Settings) -> bool:
    try:
        prepare(data, settings)
    except ImageError:
        return True
    return False
