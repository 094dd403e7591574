"""Environment of the tests, and the small files that several of them read."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from fastbyol.beton import JPEG, StoredImage

# torch reads it when it is imported, here and in the processes that tests start: bits depend on it. One thread each,
# because the workers of pytest-xdist share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and processes inherit that
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as for a job in a shell's background
    signal.signal(signal.SIGINT, signal.default_int_handler)


TESTS = Path(__file__).parent


@contextmanager
def turn(*, is_alone: bool) -> Iterator[None]:
    """Wait for a test's turn among the workers of pytest-xdist: one marked `alone` runs while no other test does."""
    gate, room = (os.open(folder, os.O_RDONLY) for folder in (TESTS / "support", TESTS))  # to be locked, not read
    try:
        fcntl.flock(gate, fcntl.LOCK_EX)  # while a test waits for the room, no later one enters
        fcntl.flock(room, fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        yield
        fcntl.flock(room, fcntl.LOCK_UN)  # a process that the test forked may hold the file open
    finally:
        os.close(gate)
        os.close(room)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a law be tried once: make test-triton asks whether an old Triton runs the kernels at all."""
    parser.addoption("--first-cases", action="store_true", help="of a test with parameters run the first case only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the first case of each test, where that was asked."""
    if not config.getoption("first_cases"):
        return
    first: dict[str, pytest.Item] = {}
    for item in items:
        first.setdefault(item.nodeid.partition("[")[0], item)
    config.hook.pytest_deselected(items=[item for item in items if item not in first.values()])
    items[:] = first.values()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Run each test in its turn."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    with turn(is_alone=item.get_closest_marker("alone") is not None):
        return (yield)


class Betons(NamedTuple):
    """A labelled training and validation file and an unlabelled one, all of the demo set's classes."""

    train: Path
    val: Path
    unlabelled: Path


def write_beton(path: Path, count: int, *, split: str, labelled: bool = True) -> Path:
    """Write `count` demo images."""
    from fastbyol import jpeg  # noqa: PLC0415  # kernel tests need no images
    from fastbyol.data_prep import demo  # noqa: PLC0415
    from fastbyol.data_prep.writer import Writer  # noqa: PLC0415

    images, labels = demo.draw(count, seed=0, split=split)
    with Writer(path, capacity=count, class_names=demo.CLASS_NAMES if labelled else None) as writer:
        for image, label in zip(images, labels, strict=True):
            stored = StoredImage(JPEG, 32, 32, jpeg.encode(image, quality=90, subsampling="444"))
            writer.append(stored, label=int(label) if labelled else None)
    return path


@pytest.fixture(scope="session")
def betons(tmp_path_factory: pytest.TempPathFactory) -> Betons:
    """Write 160 training, 60 validation and 40 unlabelled images."""
    folder = tmp_path_factory.mktemp("betons")
    return Betons(
        write_beton(folder / "train.beton", 160, split="train"),
        write_beton(folder / "val.beton", 60, split="val"),
        write_beton(folder / "unlabelled.beton", 40, split="train", labelled=False),
    )
