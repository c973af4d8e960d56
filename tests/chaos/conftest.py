"""Collects the figures of the chaos tests in a fixture, and prints them at the end of the session."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator

import pytest

from chaos.figures import PROPERTY, Figures, Row, table


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Figures:
    """The figures of a test, carried by its report, so that they arrive from any pytest-xdist process."""
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
        terminalreporter.section("what was broken, and the results")
        terminalreporter.write_line("\n".join(table(sorted(rows, key=lambda row: (row.experiment, row.store)))))
