"""Laws of saving beside the step: the state of the moment is written, failures are reported, costs set the interval."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastbyol.storage.checkpoint import COPY_SHARE, EVERY_MIN_S, WRITE_SHARE, Cost, Saver, load_newest


def test_what_is_written_is_the_state_of_the_call(tmp_path: Path) -> None:
    saver, weights = Saver(tmp_path, device="cpu"), torch.zeros(1_000_000)
    saver.save({"weights": weights, "nested": [{"w": weights}], "step": 3}, step=3)
    weights.fill_(1)
    saver.wait()
    state, damaged = load_newest(tmp_path)
    assert damaged == []
    assert not state["weights"].any()
    assert not state["nested"][0]["w"].any()
    assert saver.saved_step == 3
    assert saver.pop_failure() is None


def test_a_refused_write_is_told_once_and_the_old_file_stays(tmp_path: Path) -> None:
    saver = Saver(tmp_path, device="cpu")
    saver.save({"step": 1}, step=1)
    saver.wait()
    (tmp_path / "step-000000002.pt.partial").mkdir()  # a name that cannot be opened for writing, by root either
    saver.save({"step": 2}, step=2)
    saver.wait()
    assert isinstance(saver.pop_failure(), OSError)
    assert saver.pop_failure() is None
    assert saver.saved_step == 1
    assert load_newest(tmp_path)[0]["step"] == 1


def test_the_interval_keeps_copies_and_writes_to_their_shares() -> None:
    cost = Cost()
    assert cost.interval_s() == EVERY_MIN_S
    cost.copy_s, cost.write_s = 0.5, 3.0
    assert cost.interval_s() == max(0.5 / COPY_SHARE, 3.0 / WRITE_SHARE)


@pytest.mark.parametrize("where", ["middle", "trailer"])
def test_a_flipped_bit_is_found_by_the_checksum(tmp_path: Path, where: str) -> None:
    saver = Saver(tmp_path, device="cpu")
    for step in (1, 2):
        saver.save({"step": step, "weights": torch.ones(10_000)}, step=step)
        saver.wait()
    newest = tmp_path / "step-000000002.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2 if where == "middle" else -5] ^= 1
    newest.write_bytes(data)
    state, damaged = load_newest(tmp_path)
    assert state["step"] == 1
    assert "checksum" in damaged[0]
