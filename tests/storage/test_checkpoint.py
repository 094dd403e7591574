"""Laws of checkpoints: whole or absent, two kept, the newest readable one loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastbyol.storage.checkpoint import CheckpointError, load_newest, save


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_loaded_and_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 3, 20):
        save(tmp_path, {"step": step, "weights": torch.full((3,), float(step))}, step=step)
    assert names(tmp_path) == ["step-000000003.pt", "step-000000020.pt"]
    state, damaged = load_newest(tmp_path)
    assert state["step"] == 20
    assert torch.equal(state["weights"], torch.full((3,), 20.0))
    assert damaged == []


@pytest.mark.parametrize("content", [b"", b"garbage", None], ids=["empty", "foreign", "truncated"])
def test_a_damaged_newest_falls_back_and_says_so(tmp_path: Path, content: bytes | None) -> None:
    save(tmp_path, {"step": 1}, step=1)
    newest = save(tmp_path, {"step": 2, "weights": torch.zeros(1000)}, step=2)
    newest.write_bytes(newest.read_bytes()[:-700] if content is None else content)
    state, damaged = load_newest(tmp_path)
    assert state["step"] == 1
    assert len(damaged) == 1
    assert "step-000000002.pt does not load" in damaged[0]


def test_a_later_checkpoint_that_did_not_load_makes_room(tmp_path: Path) -> None:
    for step in (1, 200, 150, 180):
        save(tmp_path, {"step": step}, step=step)
    assert names(tmp_path) == ["step-000000150.pt", "step-000000180.pt"]


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (print, ("this must not run",))

    torch.save({"step": Evil()}, tmp_path / "step-000000001.pt")
    with pytest.raises(CheckpointError, match="does not load"):
        load_newest(tmp_path)


def test_an_unwritable_state_leaves_what_was_there(tmp_path: Path) -> None:
    save(tmp_path, {"step": 1}, step=1)
    with pytest.raises(AttributeError):
        save(tmp_path, {"step": lambda: None}, step=2)
    assert names(tmp_path) == ["step-000000001.pt"]


def test_an_empty_folder_is_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="start anew without --resume"):
        load_newest(tmp_path)
