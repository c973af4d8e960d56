"""The engine without a cluster: one worker in this process, one shard after the other. For tests and one device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flux_batch.engine.protocol import FATAL, Runner, Work, describe
from flux_batch.records import Shard, ShardResult


@dataclass(frozen=True)
class LocalEngine:
    """Runs shards here and now; each gets `max_attempts` tries."""

    max_attempts: int = 3

    def run(self, runner: Runner, shards: Sequence[Shard]) -> Iterator[ShardResult]:
        """Run every shard in order."""
        work = runner.open()
        for shard in shards:
            yield self._attempt(work, shard)

    def _attempt(self, work: Work, shard: Shard) -> ShardResult:
        for attempt in range(1, self.max_attempts + 1):
            try:
                return work(shard)
            except FATAL:
                raise
            except Exception as error:
                if attempt == self.max_attempts:
                    return ShardResult(shard=shard.index, error=f"{describe(error)} (attempt {attempt})")
        raise AssertionError("unreachable: max_attempts is at least 1")
