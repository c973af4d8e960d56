"""The shares of the values that samplers drew, for the data set card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from flux_batch.config.schema import JobConfig
from flux_batch.plan.plan import Plan
from flux_batch.prompts.source import PromptSource

# The number of counted rows, spread over the whole plan: reading a row takes about 50 microseconds.
_MAX_ROWS = 20_000
_MAX_VALUES = 20


def sampled_values(config: JobConfig, plan: Plan) -> dict[str, str]:
    """Return the shares of each sampler's values, or the range of its numbers, as text.

    Raises: SourceError, StoreError if prompts cannot be read.
    """
    names = list(config.prompts.samplers)
    if not names:
        return {}
    values: dict[str, list[Any]] = {name: [] for name in names}
    for row in _rows(config, plan):
        for name in names:
            values[name].append(row.get(name))
    return {name: _words(found) for name, found in values.items()}


def _rows(config: JobConfig, plan: Plan) -> Iterator[Any]:
    source = PromptSource(config.prompts, plan.rules)
    step = -(-plan.num_prompts // _MAX_ROWS)
    for shard in plan.shards[::step]:
        yield from (row.passthrough for row in source.read(shard, config.sampling, config.model.loras))


def _words(values: list[Any]) -> str:
    """Return the shares of values, the largest first; for many different numbers, their range and mean."""
    counts = Counter("null" if value is None else str(value) for value in values)
    numbers = [value for value in values if isinstance(value, (int, float))]
    if len(numbers) == len(values) and len(counts) > _MAX_VALUES:
        return f"{min(numbers):g} to {max(numbers):g}, mean {sum(numbers) / len(numbers):g}"
    shown = [f"{value} {count / len(values):.1%}" for value, count in counts.most_common(_MAX_VALUES)]
    return ", ".join(shown) + (f" and {len(counts) - _MAX_VALUES} others" if len(counts) > _MAX_VALUES else "")
