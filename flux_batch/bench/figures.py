"""Repeated measurements and their median, minimum and maximum."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Run = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Figures:
    """A number, mostly seconds, measured several times."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle value, or the mean of the two in the middle."""
        return statistics.median(self.values)

    def scaled(self, factor: float) -> Figures:
        """Return all values times `factor`."""
        return Figures(tuple(value * factor for value in self.values))

    def to_json(self) -> dict[str, Any]:
        """Return median, least, most and every value."""
        return {
            "median": self.median,
            "least": min(self.values),
            "most": max(self.values),
            "values": list(self.values),
        }

    def __str__(self) -> str:
        return f"{number(self.median)} ({number(min(self.values))} to {number(max(self.values))})"


def number(value: float) -> str:
    """Return a number with four significant digits, without an exponent."""
    if value and abs(value) < 1e-3:
        return f"{value:.2g}" if abs(value) >= 1e-4 else f"{value:.6f}".rstrip("0").rstrip(".")
    return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def alternated(
    runs: Mapping[str, Run], repeats: int, *, warm_ups: int = 1, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Figures]:
    """Measure the seconds of runs in turn, A B A B. Disturbances of the machine then affect all.

    A run is called with its number, negative for a warm-up, and returns when its work is done.
    """
    for name in runs:
        for warm_up in range(warm_ups):
            runs[name](warm_up - warm_ups)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name, run in runs.items():
            started = clock()
            run(repeat)
            taken[name].append(clock() - started)
    return {name: Figures(tuple(values)) for name, values in taken.items()}


def ratio(ours: Figures, theirs: Figures) -> dict[str, float]:
    """Return our speed divided by theirs: of the medians, and the least and most of the pairs."""
    pairs = [b / a for a, b in zip(ours.values, theirs.values, strict=True)]
    return {"median": theirs.median / ours.median, "least": min(pairs), "most": max(pairs)}


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as text in columns, the first aligned left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
