"""What a run came to: counts, rates, and the exit code a scheduler can act on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from flux_batch.records import Commit


@dataclass(frozen=True, kw_only=True, slots=True)
class RunReport:
    """The totals of a run over all its invocations, and the effort of this one. Times in seconds."""

    name: str
    output: str
    num_shards: int
    num_committed: int
    num_images: int  # requested images in committed shards, failed ones included
    num_failed: int
    num_new_images: int  # made by this invocation
    num_workers: int  # that committed a shard in this invocation
    wall_s: float
    device_s: float
    max_failed_ratio: float
    errors: tuple[str, ...] = ()  # of shards given up

    @property
    def is_complete(self) -> bool:
        """Whether every shard is committed."""
        return self.num_committed == self.num_shards

    @property
    def failed_ratio(self) -> float:
        """Share of the requested images that failed."""
        return self.num_failed / self.num_images if self.num_images else 0.0

    @property
    def exit_code(self) -> int:
        """0 done; 1 shards were given up; 3 finished, but more rows failed than allowed."""
        if not self.is_complete:
            return 1
        return 3 if self.failed_ratio > self.max_failed_ratio else 0

    def to_json(self) -> bytes:
        """Write the report for the next stage."""
        fields = asdict(self) | {"is_complete": self.is_complete, "exit_code": self.exit_code}
        return json.dumps(fields, indent=1).encode()


@dataclass(slots=True)
class Totals:
    """Running sums over commits and results."""

    num_committed: int = 0
    num_images: int = 0
    num_failed: int = 0

    @classmethod
    def of(cls, commits: list[Commit]) -> Totals:
        """Sum what is committed already."""
        return cls(
            num_committed=len(commits),
            num_images=sum(commit.num_images for commit in commits),
            num_failed=sum(commit.num_failed for commit in commits),
        )

    def add(self, num_images: int, num_failed: int) -> None:
        """Count one more committed shard."""
        self.num_committed += 1
        self.num_images += num_images
        self.num_failed += num_failed
