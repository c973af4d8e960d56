"""Morphology of regions: erosion, dilation, opening, connected components."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Region = NDArray[np.bool_]  # (height, width)


def opened(region: Region) -> Region:
    """Return a region without parts, and with closed gaps, thinner than three pixels."""
    return shrunk(grown(shrunk(region, 1), 2), 1)


def grown(region: Region, by: int) -> Region:
    """Return a region with every pixel within `by` of it, along rows and columns."""
    for axis in [0, 1] * by:
        grown_once = region.copy()
        here, there = (grown_once, region) if axis == 0 else (grown_once.T, region.T)
        here[1:] |= there[:-1]
        here[:-1] |= there[1:]
        region = grown_once
    return region


def shrunk(region: Region, by: int) -> Region:
    """Return a region without every pixel within `by` of its outside."""
    return ~grown(~region, by)


def components(region: Region, min_area: float) -> Iterator[Region]:
    """Yield the connected parts of a region that have at least this many pixels."""
    labels = label(region)
    for number, area in enumerate(np.bincount(labels.ravel())):
        if number and area >= min_area:
            yield labels == number


def label(region: Region) -> NDArray[np.int64]:
    """Return the number of each pixel's connected part, from 1; 0 outside. Pixels touch at sides and corners."""
    height, width = region.shape
    padded = np.zeros((height, width + 2), np.int8)
    padded[:, 1:-1] = region
    change = np.diff(padded, axis=1)
    rows, starts = np.nonzero(change == 1)
    ends = np.nonzero(change == -1)[1]
    parent = list(range(len(rows)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    first_of_row = np.searchsorted(rows, np.arange(height + 1)).tolist()
    begin, end = starts.tolist(), ends.tolist()
    for row in range(1, height):
        above, here = first_of_row[row - 1], first_of_row[row]
        while above < first_of_row[row] and here < first_of_row[row + 1]:
            if begin[above] <= end[here] and begin[here] <= end[above]:
                parent[root(here)] = root(above)
            if end[above] < end[here]:
                above += 1
            else:
                here += 1
    roots = sorted({root(run) for run in range(len(parent))})
    number_of = {run: number for number, run in enumerate(roots, 1)}
    labels = np.zeros((height, width), np.int64)
    for run, (row, start, stop) in enumerate(zip(rows.tolist(), begin, end, strict=True)):
        labels[row, start:stop] = number_of[root(run)]
    return labels
