"""Laws of batch norm over ranks: two processes are one process on the joined batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.ranks import check_ranks_equal_one_process
from tests.support.tolerances import FLOAT64


@pytest.mark.parametrize("images", [(2, 2), (3, 1)], ids=["equal", "unequal"])
def test_two_ranks_equal_one_process(tmp_path: Path, images: tuple[int, int]) -> None:
    check_ranks_equal_one_process(tmp_path, images, dtype=torch.float64, atol=FLOAT64)
