"""Figures as shapes to draw: bars, histograms and lanes, in a box of WIDTH by a height."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from flux_batch.report.charts.figures import ShardTime
from flux_batch.report.progress.snapshot import duration

WIDTH = 1000.0
_MAX_BARS, _MAX_LANES = 20, 40
_NUM_BUCKETS, _NUM_BINS = 60, 40


@dataclass(frozen=True, slots=True)
class _Bar:
    """A bar: its name, its value as text, and its share of the longest."""

    name: str
    words: str
    share: float


@dataclass(frozen=True, slots=True)
class _Box:
    """A rectangle in a plot, with a sentence about it; `height` is a share of the highest."""

    left: float
    width: float
    height: float
    words: str
    is_again: bool = False


@dataclass(frozen=True, slots=True)
class _Plot:
    """Boxes over an axis, with labels at its start, its end and its top."""

    boxes: Sequence[_Box]
    start: str
    end: str
    top: str


@dataclass(frozen=True, slots=True)
class _Lane:
    """The shards of a worker over time."""

    worker: str
    words: str
    boxes: Sequence[_Box]


def bars(values: Mapping[str, float], unit: str = "") -> list[_Bar]:
    """Return the largest values as bars, and all others as one bar."""
    ordered = Counter(values).most_common()
    shown = ordered[:_MAX_BARS]
    if len(ordered) > len(shown):
        shown.append((f"{len(ordered) - len(shown)} others", sum(value for _, value in ordered[_MAX_BARS:])))
    highest, total = max((value for _, value in shown), default=0), sum(values.values())
    if not highest:
        return []
    return [_Bar(name, _worded(value, total, unit), value / highest) for name, value in shown]


def histogram(values: Sequence[float]) -> _Plot:
    """Return a histogram of finite values, in bins of equal width."""
    low, high = min(values), max(values)
    half = high / 2 - low / 2 or _NUM_BINS / 2  # half the range, since the full range may overflow
    counts = Counter(min(_NUM_BINS - 1, int((value / 2 - low / 2) / half * _NUM_BINS)) for value in values)
    highest, width = max(counts.values()), WIDTH / _NUM_BINS
    digits = _digits(max(-low, high), 2 * (half / _NUM_BINS))
    edges = [f"{2 * (low / 2 + half * (number / _NUM_BINS)):.{digits}g}" for number in range(_NUM_BINS + 1)]
    boxes = [
        _Box(number * width, width, count / highest, f"{edges[number]} to {edges[number + 1]}: {count:,}")
        for number, count in sorted(counts.items())
    ]
    return _Plot(boxes, f"{low:.{digits}g}", f"{high:.{digits}g}", f"{highest:,}")


def _digits(largest: float, step: float) -> int:
    """Return the number of significant digits that distinguish numbers a step apart; a float has 17."""
    return min(17, max(6, 2 + math.floor(math.log10(largest / step)))) if largest > step else 6


def throughput(shards: Sequence[ShardTime]) -> _Plot:
    """Return the images per second over time. A shard's images are spread over its working time."""
    first, last = _span(shards)
    step = (last - first) / _NUM_BUCKETS
    made = [0.0] * _NUM_BUCKETS
    for each in shards:
        length = max(each.finished - each.started, 1e-3)
        begin = (each.started - first) / step
        end = begin + length / step
        for bucket in range(int(begin), min(_NUM_BUCKETS - 1, int(end)) + 1):
            inside = min(end, bucket + 1) - max(begin, bucket)
            made[bucket] += (each.num_images - each.num_failed) * min(1.0, max(0.0, inside) * step / length)
    rates = [images / step for images in made]
    highest, width = max(rates), WIDTH / _NUM_BUCKETS
    boxes = [
        _Box(number * width, width, rate / highest, f"{_clock(first + number * step)}: {rate:.3g} images/s")
        for number, rate in enumerate(rates)
        if rate
    ]
    return _Plot(boxes, _clock(first), _clock(last), f"{highest:.3g} images/s")


def lanes(shards: Sequence[ShardTime]) -> list[_Lane]:
    """Return the workers over time, in the order of their start."""
    first, last = _span(shards)
    by_worker: dict[str, list[ShardTime]] = {}
    for each in sorted(shards, key=lambda each: each.started):
        by_worker.setdefault(each.worker, []).append(each)
    return [_lane(worker, its, first, WIDTH / (last - first)) for worker, its in list(by_worker.items())[:_MAX_LANES]]


def _lane(worker: str, shards: Sequence[ShardTime], first: float, scale: float) -> _Lane:
    boxes = [
        _Box(
            (each.started - first) * scale,
            max(1.0, (each.finished - each.started) * scale),
            0.45,
            f"shard {each.shard}, {each.num_images:,} images, {duration(each.finished - each.started)}"
            + (f", attempt {each.attempt}" if each.attempt > 1 else ""),
            each.attempt > 1,
        )
        for each in _without_hidden(shards, 1 / scale)
    ]
    num_images = sum(each.num_images - each.num_failed for each in shards)
    return _Lane(worker, f"{_counted(len(shards), 'shard')}, {_counted(num_images, 'image')}", boxes)


def _without_hidden(shards: Sequence[ShardTime], pixel_s: float) -> list[ShardTime]:
    """Return the shards that no other one hides in the drawing, and all repeated attempts."""
    drawn: list[ShardTime] = []
    for each in shards:
        if not drawn or each.attempt > 1 or each.started - drawn[-1].started >= pixel_s:
            drawn.append(each)
    return drawn


def _span(shards: Sequence[ShardTime]) -> tuple[float, float]:
    first, last = min(each.started for each in shards), max(each.finished for each in shards)
    return first, max(last, first + 1e-3)


def _clock(unix_time: float) -> str:
    return datetime.fromtimestamp(unix_time, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _worded(value: float, total: float, unit: str) -> str:
    if unit and value < 1:
        number = f"{value:.2g}"
    else:
        number = f"{value:,.1f}" if unit and value < 100 else f"{math.ceil(value):,}"
    return f"{number}{unit} ({100 * value / total:.1f} %)"
