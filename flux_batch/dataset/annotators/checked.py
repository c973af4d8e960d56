"""The checked call of an annotator: for each image a row or an error, whatever the annotator returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from PIL import Image

from flux_batch.dataset.annotators.protocol import Annotator
from flux_batch.errors import DeviceFatal, JobError, StoreError

# Columns that are added to those of an annotator.
_TAKEN = ("key", "error_type", "error_message")


class CheckedAnnotator:
    """An annotator whose errors and wrong results affect only the image that caused them."""

    def __init__(self, annotator: Annotator, name: str) -> None:
        """Check an open annotator. Raises: JobError if it is not one."""
        self._annotator = annotator
        self._name = name
        self.columns = _columns_of(annotator, name)

    def rows(
        self, images: Sequence[Image.Image], records: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any] | Exception]:
        """Return for each image the values of the columns, or the error in their place.

        After an error the images are tried in halves, down to single ones. Raises: DeviceFatal, JobError, StoreError.
        """
        try:
            return list(self._call(images, records))
        except (DeviceFatal, JobError, StoreError):
            raise  # these concern every image
        except Exception as error:  # a user's code raises anything: it costs only the image
            if len(images) == 1:
                return [error]
        middle = len(images) // 2
        return self.rows(images[:middle], records[:middle]) + self.rows(images[middle:], records[middle:])

    def _call(
        self, images: Sequence[Image.Image], records: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any] | Exception]:
        answer = self._annotator([image.copy() for image in images], [dict(record) for record in records])
        errors: dict[int, Exception] = {}
        if isinstance(answer, Mapping):
            answer = {name: _without_errors(values, errors) for name, values in answer.items()}
        rows = self._batch(answer, len(images)).to_pylist()
        return [errors.get(number, row) for number, row in enumerate(rows)]

    def _batch(self, answer: Any, num_images: int) -> pa.RecordBatch:
        """Return a result as a batch with the declared columns. Raises: TypeError."""
        if isinstance(answer, pa.Table | pa.RecordBatch):
            answer = {name: answer[name] for name in answer.schema.names}
        if not isinstance(answer, Mapping):
            raise TypeError(f"{self._name} returned {type(answer).__name__}; it must return a mapping of columns")
        if set(answer) != set(self.columns.names):
            raise TypeError(
                f"{self._name} returned the columns {', '.join(sorted(map(str, answer))) or 'none'}; "
                f"it promises {', '.join(self.columns.names)}"
            )
        arrays = [self._array(field, answer[field.name], num_images) for field in self.columns]
        return pa.RecordBatch.from_arrays(arrays, schema=self.columns)

    def _array(self, field: pa.Field, values: Any, num_images: int) -> pa.Array:
        try:
            array = _as_array(values, field.type)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            reason = " ".join(str(error).split())
            raise TypeError(f"{self._name}: column {field.name} is not {field.type}: {reason}") from error
        if len(array) != num_images:
            raise TypeError(f"{self._name}: column {field.name} has {len(array)} values for {num_images} images")
        return array


def _without_errors(values: Any, errors: dict[int, Exception]) -> Any:
    """Return a list without its exceptions, which are added to `errors` by index."""
    if not isinstance(values, list | tuple):
        return values
    errors |= {number: value for number, value in enumerate(values) if isinstance(value, Exception)}
    return [None if isinstance(value, Exception) else value for value in values]


def _as_array(values: Any, kind: pa.DataType) -> pa.Array:
    """Return values as an Arrow array of a type."""
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if isinstance(values, pa.Array):
        return values.cast(kind)
    if isinstance(values, str | bytes):
        raise TypeError("one text where a list of values must be")
    if hasattr(values, "tolist"):  # arrays of NumPy, of any number of dimensions, and tensors on the CPU
        values = values.tolist()
    return pa.array([value.item() if hasattr(value, "item") else value for value in values], kind)


def _columns_of(annotator: Annotator, name: str) -> pa.Schema:
    """Return the columns that an annotator declares. Raises: JobError."""
    columns = getattr(annotator, "columns", None)
    if not isinstance(columns, pa.Schema) or not callable(annotator):
        raise JobError(f"{name}: an annotator must have `columns`, a pyarrow.Schema, and be callable")
    if not columns.names or len(set(columns.names)) < len(columns.names):
        raise JobError(f"{name}: `columns` must name at least one column, and none twice")
    if taken := sorted({*_TAKEN} & {*columns.names}):
        raise JobError(f"{name}: the column {taken[0]} is added to every annotation; choose another name")
    return pa.schema([field.with_nullable(True) for field in columns])
