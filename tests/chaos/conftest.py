"""The figures of the suite: a fixture takes them, the end of the session shows them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator

import pytest

from chaos.figures import PROPERTY, Figures, Row, table


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Figures:
    """What a test counted. It travels in the test's report, so that it arrives from any process of pytest-xdist."""
    return Figures(request.node.user_properties)


@pytest.fixture(autouse=True)
def _no_driver_outlives_its_test() -> Iterator[None]:
    yield
    for driver in multiprocessing.active_children():
        driver.kill()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    rows = [
        Row(**value)
        for report in reports
        if isinstance(report, pytest.TestReport) and report.when == "call"
        for name, value in report.user_properties
        if name == PROPERTY
    ]
    if rows:
        terminalreporter.section("what was broken, and what came of it")
        terminalreporter.write_line("\n".join(table(sorted(rows, key=lambda row: (row.experiment, row.store)))))
