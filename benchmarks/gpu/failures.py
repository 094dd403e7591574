"""Test runs of a call, as a pytest plugin: a test that fails is named and printed whole at once, not at the end.

`-p benchmarks.gpu.failures --failures FILE` appends the failed tests' names to FILE, which the next call can be given.
"""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Describe the option."""
    parser.addoption("--failures", metavar="FILE", help="append the names of failed tests here, as they fail")


def pytest_configure(config: pytest.Config) -> None:
    """Watch in the process that hears of all tests; workers of xdist only run them."""
    file = config.getoption("--failures")
    if file is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Failures(config, Path(file)))


class _Failures:
    """Write down each failure as it comes."""

    def __init__(self, config: pytest.Config, file: Path) -> None:
        self._config, self._file = config, file
        self._names: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._note(report.nodeid, report.longreprtext)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._note(report.nodeid, report.longreprtext)

    def _note(self, name: str, text: str) -> None:
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None:
            terminal.ensure_newline()
            terminal.write_line(f"FAILED {name}\n{text}")
        if name not in self._names:
            self._names.add(name)
            with self._file.open("a") as file:
                file.write(f"{name}\n")
