"""The work of shards, estimated from the sizes and steps in their rows.

A run begins the largest shards first. Otherwise a large last shard would keep one worker busy while others are idle.
The order changes neither the numbers nor the files nor the images of shards.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import reduce
from itertools import accumulate, pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from flux_batch.config.schema import JobConfig, SamplingConfig
from flux_batch.plan.memory import TEXT_TOKENS
from flux_batch.plan.shards import Shards
from flux_batch.prompts.source import PromptSource
from flux_batch.sampling_params import TOKEN_SIDE_PX

_FIELDS = ("width", "height", "num_inference_steps", "num_images_per_prompt")
_PIXELS_A_TOKEN = TOKEN_SIDE_PX**2
_READER_THREADS = 4


def largest_first(shards: Shards, config: JobConfig) -> Shards:
    """Return shards by their work, the largest first; unchanged if rows do not set it.

    It reads the columns of sizes, steps and numbers of images, only of Parquet files, and only if the first file has
    one of these columns. Raises: SourceError, StoreError.
    """
    source = PromptSource(config.prompts)
    if not shards or not source.numbers_of(shards.uris[shards.files[0]], _FIELDS):
        return shards
    work = _work_of_shards(shards, source, config.sampling)
    return replace(shards, numbers=array("i", sorted(shards.numbers, key=lambda number: -work[number])))


def _work_of_shards(shards: Shards, source: PromptSource, sampling: SamplingConfig) -> array[float]:
    """Return the work of each shard, in steps times tokens; read only the files of these shards."""
    parts: dict[str, list[tuple[int, int, int]]] = {}
    columns = (shards.parts[name].to_pylist() for name in ("file", "shard", "start", "num_rows"))
    for file, shard, start, num_rows in zip(*columns, strict=True):
        parts.setdefault(file, []).append((shard, start, num_rows))
    wanted = set(shards.numbers)
    parts = {file: each for file, each in parts.items() if any(shard in wanted for shard, _, _ in each)}
    work = array("d", bytes(8 * len(shards.ends)))

    def weigh(file: str) -> list[float]:
        return _work_of_parts(source, shards.uris[file], parts[file], sampling)

    with ThreadPoolExecutor(_READER_THREADS) as pool:
        for file, found in zip(parts, pool.map(weigh, parts), strict=True):
            for (shard, _, _), each in zip(parts[file], found, strict=True):
                work[shard] += each
    return work


def _work_of_parts(
    source: PromptSource, uri: str, parts: Sequence[tuple[int, int, int]], sampling: SamplingConfig
) -> list[float]:
    """Return the work of a file's parts: from its rows, or from the job's values if the parts skip rows."""
    counts = [num_rows for _, _, num_rows in parts]
    batches = source.numbers_of(uri, _FIELDS)
    if batches and [start for _, start, _ in parts] == [0, *accumulate(counts)][:-1]:
        sums = _sums((_work_of_rows(batch, sampling) for batch in batches), counts)
        if len(sums) == len(parts):
            return sums
    each = float(_work(*(float(getattr(sampling, field)) for field in _FIELDS)))
    return [num_rows * each for num_rows in counts]


def _sums(chunks: Iterable[pa.DoubleArray], counts: Sequence[int]) -> list[float]:
    """Return the sums of consecutive ranges of values; `counts` has the length of each range."""
    ends, at_ends = deque(accumulate(counts)), [0.0]
    num_values, total = 0, 0.0
    for chunk in filter(len, chunks):
        sums = pc.cumulative_sum(chunk)
        inside = []
        while ends and ends[0] <= num_values + len(sums):
            inside.append(ends.popleft() - num_values - 1)
        at_ends += [total + each for each in sums.take(pa.array(inside, pa.int64())).to_pylist()]
        num_values, total = num_values + len(sums), total + sums[-1].as_py()
    return [end - start for start, end in pairwise(at_ends)]


def _work_of_rows(batch: pa.RecordBatch, sampling: SamplingConfig) -> pa.DoubleArray:
    """Return the work of each row; a cell without a number above 0 counts as the job's value."""
    values: list[Any] = []
    for field in _FIELDS:
        default = pa.repeat(float(getattr(sampling, field)), len(batch))
        try:
            cells = batch.column(field).cast(pa.float64(), safe=False) if field in batch.schema.names else default
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            cells = default
        values.append(pc.if_else(pc.fill_null(pc.greater(cells, 0), False), cells, default))
    return _work(*values)


def _work(width: Any, height: Any, steps: Any, num_images: Any) -> Any:
    """Return images x steps x (image and text tokens), for numbers or columns."""
    tokens = pc.add(pc.divide(pc.multiply(width, height), _PIXELS_A_TOKEN), float(TEXT_TOKENS))
    result = reduce(pc.multiply, (tokens, steps, num_images))
    return result.as_py() if isinstance(result, pa.Scalar) else result
