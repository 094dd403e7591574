"""Laws of TensorBoard's event file, as tensorboard itself reads it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastbyol.monitor.tensorboard import EventFile, crc32c
from tests.support.full_disk import files_end_at


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read every scalar by its tag: steps and values."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def write(folder: Path, steps: range, *, value: float) -> None:
    """Write one scalar at each step, as one process of a run does."""
    file = EventFile(folder, first_step=steps.start, warn=pytest.fail)
    for step in steps:
        file.write(step, {"learning/loss": value})
    file.close()


def test_crc32c_is_castagnolis() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of the CRC catalogue
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, appendix B.4


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    file = EventFile(tmp_path / "tensorboard", first_step=1, warn=pytest.fail)
    for step in (1, 127, 128, 1 << 40):  # one byte of a varint, and more
        file.write(step, {"learning/loss": step / 3, "machine/très": -0.0, "long" * 50: math.inf})
    file.close()
    found = read(tmp_path / "tensorboard")
    assert [step for step, _ in found["learning/loss"]] == [1, 127, 128, 1 << 40]
    assert [value for _, value in found["learning/loss"]] == pytest.approx([1 / 3, 127 / 3, 128 / 3, (1 << 40) / 3])
    assert [value for _, value in found["machine/très"]] == [0.0] * 4
    assert [value for _, value in found["long" * 50]] == [math.inf] * 4


def test_a_value_beyond_float32_is_shown_as_infinite(tmp_path: Path) -> None:
    file = EventFile(tmp_path, first_step=1, warn=pytest.fail)
    for step, value in enumerate((1e38, 1e39, -1e300), 1):
        file.write(step, {"learning/loss": value})
    file.close()
    assert [value for _, value in read(tmp_path)["learning/loss"]] == [pytest.approx(1e38), math.inf, -math.inf]


def test_a_resumed_run_takes_the_place_of_the_steps_it_takes_again(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8), value=1.0)
    write(tmp_path, range(4, 6), value=2.0)
    assert read(tmp_path)["learning/loss"] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0)]


def test_a_full_disk_never_damages_the_file(tmp_path: Path) -> None:
    said: list[str] = []
    file = EventFile(tmp_path, first_step=1, warn=said.append)
    with files_end_at(300):
        for step in range(1, 21):
            file.write(step, {"learning/loss": float(step)})
        inside = read(tmp_path)["learning/loss"]
        assert 0 < len(inside) < 20
        assert inside == [(step, float(step)) for step in range(1, len(inside) + 1)]
    file.close()
    assert len(said) == 1
    assert read(tmp_path)["learning/loss"] == [(step, float(step)) for step in range(1, 21)]
