"""Several tries of a shard's images, and the choice of the kept one by score.

The choice depends only on the scores. After a killed attempt, the next one reads the scores from the staging area and
makes the same choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from flux_batch.config.running import QualityConfig
from flux_batch.config.schema import QUALITY_COLUMNS
from flux_batch.records import ImageRecord
from flux_batch.worker.generate import ImageOutcome
from flux_batch.worker.protocol import Scorer
from flux_batch.worker.shard import ShardRun


@dataclass(frozen=True, slots=True)
class Try:
    """One try of an image: True in `is_made` if it was made, and its score; None if it has none."""

    is_made: bool
    score: float | None


@dataclass(frozen=True, slots=True)
class Choice:
    """The number of the kept try, from 0, and whether it is accepted."""

    retry: int
    is_accepted: bool


def is_open(tries: Sequence[Try], quality: QualityConfig) -> bool:
    """Return whether an image is tried again; one that failed or has no score is not."""
    if len(tries) >= quality.max_tries or not tries[-1].is_made or tries[-1].score is None:
        return False
    return quality.keep == "best" or not _is_good(tries[-1], quality)


def choose(tries: Sequence[Try], quality: QualityConfig) -> Choice:
    """Return the try that is kept, the first of equal ones."""
    good = [number for number, one in enumerate(tries) if _is_good(one, quality)]
    best = max(range(len(tries)), key=lambda number: (_rank(tries[number]), -number))
    retry = good[0] if good and quality.keep == "first" else best
    return Choice(retry, bool(good))


def _is_good(one: Try, quality: QualityConfig) -> bool:
    return one.is_made and one.score is not None and one.score >= quality.at_least


def _rank(one: Try) -> tuple[bool, bool, float]:
    return one.is_made, one.score is not None, one.score or 0.0


def kept_record(record: ImageRecord, tries: Sequence[Try], choice: Choice, quality: QualityConfig) -> ImageRecord:
    """Return the record of the kept try with the columns of `quality`; a failed record if it is rejected."""
    score = tries[choice.retry].score
    columns = zip(QUALITY_COLUMNS, (len(tries), score, choice.is_accepted), strict=True)
    record = replace(record, passthrough={**record.passthrough, **dict(columns)})
    if record.status == "success" and not choice.is_accepted and quality.otherwise == "fail":
        return _below(record, score, len(tries), quality)
    return record


def with_scores(
    outcomes: Sequence[ImageOutcome], scorer: Scorer, record_of: Callable[[ImageOutcome], Mapping[str, Any]]
) -> list[ImageOutcome]:
    """Return outcomes with the scores of their images; `record_of` returns the metadata of an outcome."""
    made = [one for one in outcomes if not isinstance(one.result, Exception)]
    if not made:
        return [*outcomes]
    pixels = [one.result for one in made if not isinstance(one.result, Exception)]
    scores = iter(scorer(pixels, [record_of(one) for one in made]))
    return [one if isinstance(one.result, Exception) else replace(one, score=next(scores)) for one in outcomes]


class JudgedShard:
    """The rounds of a shard: each makes the next try of all images that are still below the score."""

    def __init__(self, quality: QualityConfig, first: ShardRun) -> None:
        self.index, self.scratch = first.index, first.scratch
        self._quality = quality
        self._rounds = [first]

    def next_round(self) -> ShardRun | None:
        """Return the attempt that makes the next tries; None if there are none.

        Call it only after all images of the last one are recorded.
        """
        last = self._rounds[-1]
        tasks = [task for task in last.tasks if is_open(self._tries(task.position), self._quality)]
        if not tasks:
            return None
        self._rounds.append(last.again(tasks))
        return self._rounds[-1]

    def ordered_records(self) -> list[ImageRecord]:
        """Return the records of the kept images, in input order."""
        return [record for record, _ in self._kept]

    @property
    def images(self) -> dict[str, Path]:
        """The encoded files of the kept images, by key."""
        return {record.key: path for record, path in self._kept if path is not None}

    def clean(self) -> None:
        """Remove the staged images after the commit."""
        for run in self._rounds:
            run.clean()

    @cached_property
    def _kept(self) -> list[tuple[ImageRecord, Path | None]]:
        first = self._rounds[0]
        tasks = {task.position for task in first.tasks}
        return [
            self._kept_try(position) if position in tasks else (first.records[position], None)
            for position in sorted(first.records)
        ]

    def _kept_try(self, position: tuple[int, int]) -> tuple[ImageRecord, Path | None]:
        tries = self._tries(position)
        choice = choose(tries, self._quality)
        run = self._rounds[choice.retry]
        record = kept_record(run.records[position], tries, choice, self._quality)
        return record, run.image_of(position) if record.status == "success" else None

    def _tries(self, position: tuple[int, int]) -> list[Try]:
        runs = [run for run in self._rounds if position in run.records]
        return [Try(run.records[position].status == "success", run.scores.get(position)) for run in runs]


def _below(record: ImageRecord, score: float | None, num_tries: int, quality: QualityConfig) -> ImageRecord:
    """Return the failed record of an image whose tries all scored too low."""
    reached = "could not be judged" if score is None else f"reached {score:g} at best in {num_tries} tries"
    return replace(
        record,
        status="failed",
        error_type="BelowQuality",
        error_message=f"{reached}; quality.at_least is {quality.at_least:g} of {quality.score}",
        file_name=None,
        sha256=None,
        bytes=None,
    )
