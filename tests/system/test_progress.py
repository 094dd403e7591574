"""Laws of progress: nothing for short work, lines with the time to go in a log file."""

from __future__ import annotations

import re
import time

import pytest

from fastbyol.system import progress
from fastbyol.system.progress import Progress


def test_a_log_file_gets_lines_with_the_time_to_go(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("SHOWN_AFTER_S", 0.02), ("FIRST_LINE_S", 0.1), ("LINE_EVERY_S", 0.3)):
        monkeypatch.setattr(progress, name, seconds)
    with Progress(total=40, desc="knn", unit="images") as bar:
        for _ in range(40):
            time.sleep(0.02)
            bar.update(1)
    said = capsys.readouterr().err
    assert "\r" not in said
    lines = said.splitlines()
    assert 1 <= len(lines) <= 4
    assert all(re.fullmatch(r"knn: \d+ % of 40 images, \d\d:\d\d left", line) for line in lines)


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(Progress(iter(range(5)), total=5, desc="knn", unit="images")) == list(range(5))
    assert capsys.readouterr().err == ""


def test_progress_that_the_environment_turns_off_is_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(progress, "FIRST_LINE_S", 0.0)
    assert list(Progress(range(3), total=3, desc="knn", unit="images")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
