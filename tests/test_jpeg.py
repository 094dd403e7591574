"""Laws of the JPEG codec: simplejpeg and Pillow decode to the same pixels and refuse alike."""

from __future__ import annotations

import io
import logging
import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fastbyol import jpeg

pytest.importorskip("simplejpeg")
Pixels = NDArray[np.uint8]


def picture(height: int = 141, width: int = 203) -> Pixels:
    """Draw smooth waves, edges and noise: what transform and upsampling could round differently."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([127 + 100 * np.sin(x / 9 + y / 17), 127 + 120 * np.cos(x / 5), (x * y) % 256], 2)
    return np.clip(waves + np.random.default_rng(0).normal(0, 20, waves.shape), 0, 255).astype(np.uint8)


def written(mode: str, **settings: object) -> bytes:
    """Write the picture as a JPEG by Pillow."""
    data = io.BytesIO()
    Image.fromarray(picture()).convert(mode).save(data, "JPEG", **settings)
    return data.getvalue()


def without_adobe(data: bytes) -> bytes:
    """Cut Adobe's marker out of a JPEG."""
    at = data.index(b"\xff\xee")
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


FILES = {
    **{
        f"{kind} {sampling}": written("RGB", quality=85, subsampling=sampling, progressive=kind == "progressive")
        for kind in ("baseline", "progressive")
        for sampling in ("4:4:4", "4:2:2", "4:2:0")
    },
    "gray": written("L", quality=85),
    "RGB stored as such": written("RGB", keep_rgb=True),
    "restart markers": written("RGB", restart_marker_rows=1),
}
INKS = {"Adobe": written("CMYK"), "plain": without_adobe(written("CMYK"))}


def by_both(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> tuple[object, object]:
    """Call with simplejpeg, then without; an error's type stands for it."""

    def outcome() -> object:
        try:
            return call()
        except ValueError as error:
            return type(error)

    first = outcome()
    with monkeypatch.context() as patched:
        patched.setattr(jpeg, "simplejpeg", None)
        return first, outcome()


@pytest.mark.parametrize("name", FILES)
def test_both_decode_to_the_same_pixels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = by_both(monkeypatch, lambda: jpeg.decode(FILES[name]))
    assert isinstance(first, np.ndarray)
    assert first.shape == (141, 203, 3)
    assert np.array_equal(first, second)  # type: ignore[arg-type]

    def into() -> object:
        out = np.full(first.size + 5, 7, np.uint8)
        assert jpeg.decode_into(out, memoryview(FILES[name])) == (141, 203)
        return out.tobytes()

    assert by_both(monkeypatch, into) == (first.tobytes() + bytes([7] * 5),) * 2
    assert by_both(monkeypatch, lambda: jpeg.verify(FILES[name])) == (None, None)


@pytest.mark.parametrize("name", INKS)
def test_both_hand_ink_over_as_stored(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = by_both(monkeypatch, lambda: jpeg.decode(INKS[name], "CMYK"))
    assert np.array_equal(first, second)  # type: ignore[arg-type]


@pytest.mark.parametrize("subsampling", ["444", "422", "420"])
@pytest.mark.parametrize("quality", [50, 90, 96])
def test_both_encode_alike(quality: int, subsampling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = by_both(monkeypatch, lambda: jpeg.encode(picture(), quality=quality, subsampling=subsampling))
    assert isinstance(first, bytes)
    assert isinstance(second, bytes)
    if quality == 96:  # from here on simplejpeg takes the accurate transform, too
        assert first == second
    errors = [np.square(jpeg.decode(data) - picture().astype(np.float64)).mean() for data in (first, second)]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


@pytest.mark.parametrize(
    "call",
    {
        "no bytes": lambda: jpeg.decode(b""),
        "another format": lambda: jpeg.verify(b"GIF89a" + bytes(50)),
        "cut in the header": lambda: jpeg.decode(FILES["gray"][:50]),
        "cut in the scan": lambda: jpeg.decode(FILES["gray"][:-2000]),
        "cut in the scan, checked": lambda: jpeg.verify(FILES["baseline 4:2:0"][:-2000]),
        "colour as ink": lambda: jpeg.decode(FILES["baseline 4:2:0"], "CMYK"),
        "small buffer": lambda: jpeg.decode_into(np.empty(100, np.uint8), FILES["gray"]),
    }.items(),
    ids=lambda item: item[0],
)
def test_both_refuse_with_value_error(call: tuple[str, Callable[[], object]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(issubclass(kind, ValueError) for kind in by_both(monkeypatch, call[1]))  # type: ignore[arg-type]


def test_a_missing_codec_is_named_once_by_many_threads(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(jpeg, "simplejpeg", None)
    monkeypatch.setattr(jpeg, "_warn_permit", threading.Semaphore(1))
    threads = [threading.Thread(target=jpeg.decode, args=(FILES["gray"],)) for _ in range(8)]
    with caplog.at_level(logging.WARNING):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    (record,) = caplog.records
    assert "pip install simplejpeg" in record.getMessage()


@pytest.mark.parametrize("codec", ["simplejpeg", "Pillow"])
def test_other_threads_run_while_one_decodes(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if codec == "Pillow":
        monkeypatch.setattr(jpeg, "simplejpeg", None)
    data = jpeg.encode(np.tile(picture(), (20, 15, 1)), quality=90, subsampling="420")  # 2820 x 3045 pixels
    beginning, happened = threading.Event(), []

    def decode() -> None:
        beginning.set()
        jpeg.decode(data)
        happened.append("decoded")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)  # no thread is interrupted: another one runs when it lets the lock go
    try:
        thread = threading.Thread(target=decode)
        thread.start()
        beginning.wait()
        happened.append("meanwhile")
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert happened == ["meanwhile", "decoded"]
