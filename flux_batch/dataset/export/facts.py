"""The facts of an exported data set, for its card: all read from the run, none guessed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from flux_batch.dataset.export.source import ExportSource
from flux_batch.dataset.select.files import read_tables
from flux_batch.dataset.select.selection import made_by
from flux_batch.output.annotations import AnnotationFolder
from flux_batch.output.commit_log import CommitLog
from flux_batch.output.formats import OutputFormat
from flux_batch.output.paths import REPORT
from flux_batch.report.gallery.content import Gallery, GalleryImage, read_file
from flux_batch.report.gallery.rows import GalleryRow, spread
from flux_batch.report.gallery.sheet import draw_sheet
from flux_batch.report.saved_run import read_json
from flux_batch.report.summary import Totals

_BINS = 20
_SAMPLES = 24


@dataclass(frozen=True)
class Histogram:
    """The distribution of a numeric column over the chosen images."""

    column: str
    num_values: int
    quantiles: tuple[float, float, float]  # 5 %, 50 %, 95 %
    low: float
    high: float
    counts: tuple[int, ...]  # in bins of equal width from low to high


@dataclass(frozen=True)
class RunFacts:
    """The counts of the run, and the figures of its report."""

    num_images: int
    num_failed: int
    failures: Mapping[str, int]
    gpu_hours: float | None  # None if the run has no report
    device_hours: float
    model: Mapping[str, Any]
    versions: Mapping[str, Any]


def run_facts(source: ExportSource) -> RunFacts:
    """Sum up the commits of a run by their log, and read its report."""
    totals = Totals.of(CommitLog.read(source.run.commits))
    report = read_json(source.run.store, REPORT) or {}
    gpu_s = report.get("gpu_s_of_run")
    return RunFacts(
        num_images=totals.num_images,
        num_failed=totals.num_failed,
        failures=dict(totals.failures.most_common()),
        gpu_hours=None if gpu_s is None else float(gpu_s) / 3600,
        device_hours=totals.device_s / 3600,
        model=report.get("model") or {},
        versions=report.get("versions") or {},
    )


def selection_facts(source: ExportSource) -> Mapping[str, Any]:
    """Return the criteria of the selection and the counts that they left out; {} without a selection."""
    return made_by(source.run.store, source.selection) if source.selection is not None else {}


def annotators(source: ExportSource) -> dict[str, Mapping[str, Any]]:
    """Return the stored identity of each annotation's annotator."""
    store, names = source.run.store, dict.fromkeys(column.annotation for column in source.annotation_columns)
    return {name: read_json(store, AnnotationFolder(source.run.folder, name).identity) or {} for name in names}


def histograms(source: ExportSource) -> list[Histogram]:
    """Return the histogram of every numeric annotation over the chosen images."""
    chosen = pa.table({"key": source.chosen["key"]})
    found = []
    for column in source.annotation_columns:
        if pa.types.is_floating(column.kind) or (pa.types.is_integer(column.kind) and column.column != "phash"):
            shards = sorted(source.annotated[column.annotation])
            schema = pa.schema([("key", pa.string()), (column.column, pa.float64())])
            tables = read_tables(source.run, shards, column.annotation, schema)
            values = pa.concat_tables(tables).join(chosen, "key", join_type="inner")[column.column]
            numbers = values.drop_null().to_numpy()
            numbers = numbers[np.isfinite(numbers)]
            if len(numbers):
                found.append(_histogram(column.name, numbers))
    return found


def sample_sheet(source: ExportSource) -> bytes:
    """Return a JPEG with some of the chosen images, evenly spread, and their prompts."""
    numbers = spread(source.chosen.num_rows, _SAMPLES)
    some = source.chosen.take(numbers)
    by_shard: dict[int, list[str]] = {}
    for key, shard in zip(some["key"].to_pylist(), some["shard"].to_pylist(), strict=True):
        by_shard.setdefault(shard, []).append(key)
    images: list[GalleryImage] = []
    for shard, keys in by_shard.items():
        rows = {str(row["key"]): row for row in source.run.metadata(shard)}
        images += _thumbnails(source, source.run.output_format, [rows[key] for key in keys])
    totals = run_facts(source)
    gallery = Gallery(
        name=source.run.config.name,
        images=images,
        num_images=source.chosen.num_rows,
        failed=(),
        num_failed=totals.num_failed,
        num_committed=source.run.num_shards,
        num_shards=source.run.num_shards,
        is_complete=True,
    )
    return draw_sheet(gallery)


def _thumbnails(
    source: ExportSource, output_format: OutputFormat, rows: Sequence[Mapping[str, Any]]
) -> list[GalleryImage]:
    files: dict[str, list[GalleryRow]] = {}
    for row in rows:
        files.setdefault(str(row["file_name"]), []).append(GalleryRow(row))
    return [image for some in files.values() for image in read_file(source.run.store, output_format, some)]


def _histogram(column: str, numbers: NDArray[np.float64]) -> Histogram:
    low, high = float(numbers.min()), float(numbers.max())
    half = high / 2 - low / 2 or 1.0  # half the range: the full range may overflow, and may be 0
    counts, _ = np.histogram((numbers / 2 - low / 2) / half, _BINS, (0, 1))
    five, half_of_all, most = (float(value) for value in 2 * np.quantile(numbers / 2, (0.05, 0.5, 0.95)))
    return Histogram(column, len(numbers), (five, half_of_all, most), low, high, tuple(int(count) for count in counts))
