"""A full disk for the code under test: files of this process cannot grow beyond a limit."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def files_end_at(limit: int) -> Iterator[None]:
    """Let no file of this process grow beyond `limit` bytes: writes come short, then fail with EFBIG.

    Python ignores SIGXFSZ, so the refusal is an OSError, as that of a full disk is.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
