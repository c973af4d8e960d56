"""The figures of the chaos tests: one row per experiment and store, one table at the end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace

# The name of a row in the report of its test, which carries it from the test's process to pytest.
PROPERTY = "chaos figures"


@dataclass(frozen=True, kw_only=True)
class Row:
    """The figures of one experiment on one store, summed over its tests."""

    experiment: str
    store: str
    images: int = 0  # requested, over all runs of the experiment
    kills: int = 0  # processes and nodes killed, which the run survived
    faults: int = 0  # injected bad answers of a store, damaged files or rows
    lost: int = 0  # images that were requested and could be made, but are missing
    doubled: int = 0  # images that a reader finds more than once
    redone: int = 0  # images made again


class Figures:
    """The figures of one test."""

    def __init__(self, properties: list[tuple[str, object]]) -> None:
        self._properties = properties

    def add(
        self,
        *,
        experiment: str,
        store: str,
        images: int = 0,
        kills: int = 0,
        faults: int = 0,
        lost: int = 0,
        doubled: int = 0,
        redone: int = 0,
    ) -> None:
        """Count something for the table."""
        row = Row(
            experiment=experiment,
            store=store,
            images=images,
            kills=kills,
            faults=faults,
            lost=lost,
            doubled=doubled,
            redone=redone,
        )
        self._properties.append((PROPERTY, asdict(row)))


def table(rows: Iterable[Row]) -> list[str]:
    """Return the lines of the table, in Markdown."""
    summed: dict[tuple[str, str], Row] = {}
    for row in rows:
        there = summed.get((row.experiment, row.store))
        summed[row.experiment, row.store] = row if there is None else _sum(there, row)
    lines = [
        ["experiment", "store", "images", "kills survived", "faults injected", "lost", "doubled", "redone"],
        *(_cells(row) for row in summed.values()),
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    ruler = ["-" * width if column < 2 else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return [f"| {' | '.join(map(_fit, line, widths, range(len(widths))))} |" for line in (lines[0], ruler, *lines[1:])]


def _sum(one: Row, other: Row) -> Row:
    counts = [field.name for field in fields(Row) if field.name not in ("experiment", "store")]
    return replace(one, **{name: getattr(one, name) + getattr(other, name) for name in counts})


def _cells(row: Row) -> list[str]:
    share = f" ({row.redone / row.images:.1%})" if row.redone and row.images else ""
    counts = [row.images, row.kills, row.faults, row.lost, row.doubled]
    return [row.experiment, row.store, *(f"{count:,}" for count in counts), f"{row.redone:,}{share}"]


def _fit(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column < 2 else cell.rjust(width)
