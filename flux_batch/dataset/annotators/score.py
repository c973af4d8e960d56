"""An annotator as the score of a job's `quality`: one number for each image."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from PIL import Image

from flux_batch.config.running import QualityConfig
from flux_batch.dataset.annotators.load import BUILT_IN, AnnotatorSpec, check_factory, open_annotator
from flux_batch.errors import InvalidSetting, JobError, one_line
from flux_batch.images import Pixels

log = logging.getLogger(__name__)


class _Score:
    """A column of an annotator, as a number for each image."""

    def __init__(self, quality: QualityConfig) -> None:
        """Open the annotator. Raises: JobError."""
        _, column = _annotator_and_column(quality.score)
        self._annotator = open_annotator(_spec(quality)).checked
        columns = self._annotator.columns
        self._column = column or columns.names[0]
        if self._column not in columns.names or not _is_number(columns.field(self._column).type):
            numbers = [field.name for field in columns if _is_number(field.type)]
            raise InvalidSetting(
                f"quality.score = {quality.score}: must be a column of numbers: {', '.join(numbers) or 'it has none'}",
                field="score",
            )

    def __call__(self, images: Sequence[Pixels], records: Sequence[Mapping[str, Any]]) -> list[float | None]:
        """Return the scores; None for an image that cannot be judged, for which the reason is logged."""
        flat = [{**record.get("passthrough", {}), **record} for record in records]
        rows = self._annotator.rows([Image.fromarray(image) for image in images], flat)
        return [self._score(row, record) for row, record in zip(rows, records, strict=True)]

    def _score(self, row: Mapping[str, Any] | Exception, record: Mapping[str, Any]) -> float | None:
        if isinstance(row, Exception):
            log.warning("%s: cannot be judged: %s", record["key"], one_line(row))
            return None
        score = row[self._column]
        return None if score is None or math.isnan(score) else float(score)


def check_score(quality: QualityConfig, *, is_here: bool = False) -> None:
    """Raise JobError for a score that names no annotator; the annotator is not opened.

    is_here: whether the workers are on this machine, so that its code and options can be checked here.
    """
    spec = _spec(quality)
    if is_here:
        try:
            check_factory(spec, "quality.options: {key: value}")
        except JobError as error:
            raise JobError(f"quality.score = {error}") from error


def load_scorer(quality: QualityConfig) -> _Score:
    """Open the score of a job. Raises: JobError."""
    return _Score(quality)


def _spec(quality: QualityConfig) -> AnnotatorSpec:
    annotator, _ = _annotator_and_column(quality.score)
    try:
        return AnnotatorSpec(name="quality", annotator=annotator, options=quality.options, folder=os.getcwd())
    except JobError as error:
        raise JobError(f"quality.score = {error}") from error


def _annotator_and_column(text: str) -> tuple[str, str]:
    """Return the annotator and the column that `quality.score` names; "" for its first column."""
    name, _, column = text.partition(".")
    return (name, column) if name in BUILT_IN else (text, "")


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind))
