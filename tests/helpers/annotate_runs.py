"""Runs annotators on a run in this process, and reads their annotations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from flux_batch.config.schema import JobConfig
from flux_batch.dataset.annotate import AnnotateReport, AnnotateSettings, annotate
from flux_batch.dataset.annotate_worker import AnnotateFactory, AnnotateWorker
from flux_batch.dataset.annotators.load import parse_specs
from flux_batch.engine.local import LocalEngine
from flux_batch.records import FileRange, Shard
from helpers import annotators

PROMPTS = "helpers.annotators:Prompts"
BOTH = (f"prompts={PROMPTS}", "phash")


def annotated(config: JobConfig, *texts: str, batch_size: int = 2, **options: Any) -> AnnotateReport:
    """Annotate a run in this process. Options of annotators are named `NAME.key`, all others go to `annotate`."""
    chosen = {name: options.pop(name) for name in list(options) if "." in name}
    settings = AnnotateSettings(batch_size=batch_size, failures=("max_ratio=1.0", "lease_ttl_s=5"))
    return annotate(
        config.output.uri, parse_specs(texts, chosen), settings=settings, **{"engine": LocalEngine(), **options}
    )


def files(config: JobConfig) -> dict[str, bytes]:
    """Return the files of all annotations, by their names."""
    folder = Path(config.output.uri, "annotations")
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}


def rows(config: JobConfig, name: str) -> list[dict[str, Any]]:
    """Return the rows of an annotation, in order."""
    paths = sorted(Path(config.output.uri, "annotations", name).glob("*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def open_worker(config: JobConfig, *texts: str, batch_size: int = 2, **options: Any) -> AnnotateWorker:
    """Open an annotation worker, as an engine does."""
    return AnnotateFactory(
        output=config.output.uri,
        storage_options={},
        specs=tuple(parse_specs(texts, options)),
        batch_size=batch_size,
        failures=config.failures,
    ).open()


def shard_of(index: int, num_rows: int = 4) -> Shard:
    """Return the descriptor of a shard."""
    return Shard(index=index, parts=(FileRange(uri="", name="", start=0, num_rows=num_rows),))


def after_calls(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], None]) -> None:
    """Run an action after call `number` of the annotator."""
    call = annotators.Prompts.__call__

    def counted(self: Any, images: Any, records: Any) -> Any:
        answer = call(self, images, records)
        if len(annotators.CALLS) == number:
            action()
        return answer

    monkeypatch.setattr(annotators.Prompts, "__call__", counted)
