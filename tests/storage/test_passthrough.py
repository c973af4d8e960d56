from __future__ import annotations

import json

import pyarrow as pa
import pytest

from flux_batch.storage.passthrough import as_json, portable


@pytest.mark.parametrize(
    "kind",
    [
        pa.int8(),
        pa.uint64(),
        pa.float16(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(4),
        pa.large_binary(),
        pa.date64(),
        pa.time32("s"),
        pa.time64("us"),
        pa.decimal256(50, 2),
        pa.decimal32(5, 1),
        pa.list_(pa.int64(), 3),
        pa.large_list(pa.large_string()),
        pa.dictionary(pa.int32(), pa.string()),
        pa.struct([("a", pa.list_(pa.dictionary(pa.int8(), pa.string())))]),
        pa.uuid(),
        pa.null(),
    ],
    ids=str,
)
def test_every_type_that_may_travel_is_one_that_datasets_knows(kind: pa.DataType) -> None:
    import datasets

    carried = portable(kind)

    assert portable(carried) == carried
    datasets.Features.from_arrow_schema(pa.schema([("x", carried)]))
    json.dumps(as_json(None, carried))


@pytest.mark.parametrize(
    "kind",
    [
        pa.map_(pa.string(), pa.int8()),
        pa.month_day_nano_interval(),
        pa.struct([("a", pa.map_(pa.string(), pa.int8()))]),
    ],
    ids=str,
)
def test_other_types_may_not(kind: pa.DataType) -> None:
    with pytest.raises(ValueError, match="cannot be passed through"):
        portable(kind)
