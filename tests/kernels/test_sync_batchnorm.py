"""Laws of the batch-norm kernels over ranks: two processes are one process on the joined batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.ranks import check_ranks_equal_one_process
from tests.support.tolerances import FLOAT32_BATCHNORM


@pytest.mark.skipif(torch.cuda.is_available(), reason="two interpreters on the CPU; a GPU has its own tests")
def test_two_ranks_of_unequal_size_equal_one_process(tmp_path: Path) -> None:
    check_ranks_equal_one_process(tmp_path, (3, 1), dtype=torch.float32, atol=10 * FLOAT32_BATCHNORM)
