"""Near-duplicates: images are kept from the best on, and each image near to a kept one is dropped.

The search is exact, so that a selection is reproducible; its work grows with the square of the images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

_Matrix: TypeAlias = NDArray[np.bool_]
_Values: TypeAlias = NDArray[Any]
# The size of a block of comparisons with kept images; its distances take 8 MB or less.
_ROWS, _COLUMNS = 512, 2048
# The cosine of two equal embeddings, summed in float32, may be below 1 by this much.
_ROUNDING = 1e-6


def near_hashes(hashes: NDArray[np.uint64], distance: int) -> NDArray[np.int64]:
    """Find the hashes within `distance` bits, of 64, of a better one.

    hashes: [n], the best first. Returns: [n], for each hash the index of the kept hash near it; its own if it is kept.
    """

    def is_near(some: NDArray[np.uint64], others: NDArray[np.uint64]) -> _Matrix:
        return np.asarray(np.bitwise_count(some[:, None] ^ others[None, :]) <= distance, np.bool_)

    # Equal hashes first: a run with few prompts has many, and they need no comparison.
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.sort(first)
    near = _near(hashes[order], is_near)
    return order[near[np.searchsorted(order, first[group])]].astype(np.int64)


def near_embeddings(embeddings: NDArray[np.float32], distance: float) -> NDArray[np.int64]:
    """Find the embeddings within `distance`, 1 - cosine, of a better one.

    embeddings: [n, d], the best first. Returns: like `near_hashes`.
    """
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit = embeddings / np.maximum(lengths, np.finfo(np.float32).tiny)

    def is_near(some: NDArray[np.float32], others: NDArray[np.float32]) -> _Matrix:
        return some @ others.T >= np.float32(1 - distance - _ROUNDING)

    return _near(unit, is_near)


def _near(values: _Values, is_near: Callable[[_Values, _Values], _Matrix]) -> NDArray[np.int64]:
    """Keep values, the best first, unless they are near to a kept one. Returns: like `near_hashes`."""
    stays_instead = np.arange(len(values))
    kept = np.empty(0, np.int64)
    for start in range(0, len(values), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(values)))
        for first in range(0, len(kept), _COLUMNS):
            some = kept[first : first + _COLUMNS]
            matrix = is_near(values[rows], values[some])
            found = matrix.any(axis=1)
            stays_instead[rows[found]] = some[matrix[found].argmax(axis=1)]
            rows = rows[~found]
            if not len(rows):
                break
        kept = np.concatenate([kept, rows[_keep_among(is_near(values[rows], values[rows]), rows, stays_instead)]])
    return stays_instead


def _keep_among(matrix: _Matrix, rows: NDArray[np.int64], stays_instead: NDArray[np.int64]) -> _Matrix:
    """Keep values of a block, and store for each dropped one the kept one."""
    stays = np.ones(len(rows), np.bool_)
    for number in range(len(rows)):
        if stays[number]:
            gone = np.flatnonzero(matrix[number, number + 1 :] & stays[number + 1 :]) + number + 1
            stays[gone] = False
            stays_instead[rows[gone]] = rows[number]
    return stays
