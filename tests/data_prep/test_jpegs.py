"""Laws of JPEG files: faults outside the pixels are repaired to the same pixels, faults in them are expected."""

from __future__ import annotations

import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fastbyol.beton import JPEG, RAW
from fastbyol.data_prep import jpegs
from fastbyol.data_prep.images import ImageError, prepare
from fastbyol.data_prep.settings import Settings

RAW_ALL = Settings(mode="raw", max_side=2000)


def smooth(height: int = 64, width: int = 80) -> NDArray[np.uint8]:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * x / (width - 1), 255 * y / (height - 1), (x * y) % 200], axis=2).round().astype(np.uint8)


def encode(**options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(smooth()).save(stream, "JPEG", **{"quality": 90, **options})  # type: ignore[arg-type]
    return stream.getvalue()


WHOLE = encode()
SCAN = WHOLE.index(b"\xff\xda")
ADOBE = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\x02"
FAULTS = {
    "JFIF 0.00": WHOLE[:11] + b"\0\0" + WHOLE[13:],
    "Adobe transform 2": WHOLE[:2] + ADOBE + WHOLE[20:],
    "scan parameters": WHOLE[: SCAN + 11] + b"\0\0\0" + WHOLE[SCAN + 14 :],
    "zeros before the end": WHOLE[:-2] + b"\0" * 4 + WHOLE[-2:],
    "many zeros before the end": WHOLE[:-2] + b"\0" * 5000 + WHOLE[-2:],
    "count of ICC parts": encode(icc_profile=b"x" * 200).replace(b"ICC_PROFILE\0\1\1", b"ICC_PROFILE\0\1\2"),
    "bytes between markers": WHOLE[:20] + b"\0\0\0\0" + WHOLE[20:],
    "two of them": WHOLE[:11] + b"\0\0" + WHOLE[13:-2] + b"\0" * 4 + WHOLE[-2:],
}


def by_pillow(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def stored(data: bytes, notes: list[str] | None = None) -> NDArray[np.uint8]:
    image = prepare(data, RAW_ALL, notes=notes)
    return np.frombuffer(image.data, np.uint8).reshape(image.height, image.width, 3)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("progressive", [False, True], ids=["baseline", "progressive"])
def test_a_fault_outside_the_pixels_is_repaired_and_told(fault: str, progressive: bool) -> None:
    data = FAULTS[fault]
    if progressive and fault == "zeros before the end":
        data = encode(progressive=True)[:-2] + b"\0" * 4 + b"\xff\xd9"
    notes: list[str] = []
    assert np.array_equal(stored(data, notes), by_pillow(data))
    assert len(notes) == 1
    assert prepare(data, Settings(mode="passthrough")).data != data, "loaders would refuse it as it is"


@pytest.mark.parametrize("sampling", [(4, 2), (3, 1), (1, 3), (2, 4), (4, 1)])
def test_chroma_in_any_proportion_decodes_as_in_pillow(sampling: tuple[int, int]) -> None:
    across, down = sampling
    data = constant(across, down)
    assert np.array_equal(stored(data), by_pillow(data))
    is_read_by_loaders = sampling == (4, 1)  # 4:1:1
    assert (prepare(data, Settings(mode="passthrough")).data == data) == is_read_by_loaders


def constant(across: int, down: int) -> bytes:
    """Write a gray image of 32 px with `across` x `down` blocks of luma for one of each chroma."""
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), (128, 128, 128)).save(stream, "JPEG", subsampling=0)
    data = stream.getvalue()
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    head = bytearray(data[: scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")])
    head[frame + 11] = across << 4 | down
    units = -(-32 // (8 * across)) * -(-32 // (8 * down))
    bits = ("001010" * (across * down) + "0000" * 2) * units  # each block: no difference, no more coefficients
    bits += "1" * (-len(bits) % 8)
    return bytes(head) + int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0") + b"\xff\xd9"


def test_no_damage_of_the_scan_passes_for_a_fault_outside() -> None:
    """Bytes changed anywhere in the scan: either libjpeg sees nothing, as without repairs, or the file is refused."""
    rng = np.random.default_rng(0)
    body = np.arange(SCAN + 14, len(WHOLE) - 2)
    for _ in range(300):
        data = bytearray(WHOLE)
        for place in rng.choice(body, rng.integers(1, 4)):
            data[place] = rng.integers(0, 256)
        notes: list[str] = []
        try:
            stored(bytes(data), notes)
        except ImageError:
            continue
        assert not notes


def test_stuffed_bytes_at_the_end_of_a_scan_are_no_padding() -> None:
    for end in (b"\x12\xff\0", b"\xff\0\xff\0", b"\xff\0", b"\x12"):
        for padding in (b"", b"\0\0\0", b"\xff\xff", b"\xff\xff\0\0"):
            assert jpegs._without_padding(b"\x34" + end + padding) == b"\x34" + end


def test_a_cut_file_is_kept_as_far_as_it_decodes_if_that_is_asked_for() -> None:
    cut = WHOLE[: len(WHOLE) * 2 // 3]
    with pytest.raises(ImageError, match="Premature end"):
        prepare(cut, RAW_ALL)
    notes: list[str] = []
    image = prepare(cut, Settings(mode="raw", keeps_damaged=True), notes=notes)
    pixels = np.frombuffer(image.data, np.uint8).reshape(image.height, image.width, 3)
    assert np.array_equal(pixels[:24], by_pillow(WHOLE)[:24])
    assert notes[0].startswith("kept what decodes: ")
    with pytest.raises(ImageError):
        prepare(b"\xff\xd8\xff", Settings(keeps_damaged=True))


@pytest.mark.parametrize("limit", [64 * 80 - 1, 40 * 32, 20 * 16])
def test_a_jpeg_of_too_many_pixels_is_scaled_while_it_is_decoded(limit: int) -> None:
    settings = Settings(mode="raw", max_side=10, max_pixels=limit)
    image = prepare(WHOLE, settings)
    assert (image.width, image.height) == (10, 8)
    whole = prepare(WHOLE, Settings(mode="raw", max_side=10))
    near = np.frombuffer(image.data, np.uint8).astype(int) - np.frombuffer(whole.data, np.uint8)
    assert np.abs(near).mean() < 12  # a pattern of period 200 in blue is coarse at 10 px


def test_what_cannot_be_scaled_to_the_limit_is_told_what_to_give() -> None:
    for data, max_side, expected in (
        (WHOLE, 60, "give a larger --max-pixels or a smaller --max-side"),
        (encode(progressive=True), 10, "progressive JPEG of 80x64 pixels; at most 1000"),
    ):
        with pytest.raises(ImageError, match=expected):
            prepare(data, Settings(max_side=max_side, max_pixels=1000))


def test_small_images_are_kept_as_they_are_and_large_ones_encoded() -> None:
    def image(side: int, kind: str) -> bytes:
        stream = io.BytesIO()
        Image.fromarray(smooth(side, side)).save(stream, kind)
        return stream.getvalue()

    for side, kind, mode in (
        (64, "PNG", RAW),
        (65, "PNG", JPEG),
        (64, "JPEG", JPEG),
        (65, "JPEG", JPEG),
        (64, "WEBP", JPEG),
    ):
        data = image(side, kind)
        found = prepare(data, Settings())
        assert found.mode == mode, (side, kind)
        assert (found.data == data) == (side == 64 and kind == "JPEG")
