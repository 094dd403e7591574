"""Laws of JPEG XL's size: read without decoding it is the decoder's, of any side, and bombs are refused by it."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from fastbyol.data_prep import jxl, pixels
from fastbyol.data_prep.formats import ImageError

pytest.importorskip("pillow_jxl", reason="JPEG XL's plugin is not installed")
SIDES = [(1, 1), (8, 8), (256, 256), (257, 3), (40, 32), (48, 40), (64, 48), (30, 20), (1600, 9), (512, 513), (9000, 2)]


def encoded(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (9, 80, 200)).save(file, "JXL", quality=50)
    return file.getvalue()


@pytest.mark.parametrize(("width", "height"), SIDES)
def test_the_size_is_the_decoders(width: int, height: int) -> None:
    data = encoded(width, height)
    assert jxl.read_size(data) == (width, height)
    if data.startswith(jxl.CODESTREAM):
        for kind, before in ((b"jxlc", b""), (b"jxlp", bytes(4))):
            size = (8 + len(before) + len(data)).to_bytes(4, "big")
            boxed = b"\0\0\0\x0cJXL \r\n\x87\n" + b"\0\0\0\x14ftypjxl \0\0\0\0jxl " + size + kind + before + data
            assert jxl.read_size(boxed) == (width, height)


def test_a_size_in_parts_is_found() -> None:
    data = encoded(300, 200)
    assert data.startswith(jxl.CODESTREAM)
    boxed = b"\0\0\0\x0cJXL \r\n\x87\n" + b"\0\0\0\x14ftypjxl \0\0\0\0jxl "
    for part in (b"", data[:2], data[2:3], data[3:]):
        boxed += (12 + len(part)).to_bytes(4, "big") + b"jxlp" + bytes(4) + part
    assert jxl.read_size(boxed) == (300, 200)


def test_what_is_cut_before_its_size_has_none() -> None:
    data = encoded(300, 200)
    assert [jxl.read_size(data[:count]) for count in (0, 2, 3)] == [None] * 3
    assert jxl.read_size(b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\1jxlc") is None


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(ImageError, match="bomb: 300x200 pixels; at most 1000"):
        pixels.decode(encoded(300, 200), "JXL", max_pixels=1000, stretch=None)
    with pytest.raises(ImageError, match="no size in its header"):
        pixels.decode(encoded(300, 200)[:3], "JXL", max_pixels=1000, stretch=None)
