"""Environment of the GPU tests."""

from __future__ import annotations

import os

os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")  # a borrowed machine may have no other interface
