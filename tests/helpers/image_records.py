"""Image records with passthrough columns of every type, and with values that loaders get wrong."""

from __future__ import annotations

import datetime
import decimal
from typing import Any

import pyarrow as pa

from flux_batch.output.paths import image_key
from flux_batch.records import ImageRecord
from flux_batch.sampling_params import SamplingParams

PROMPTS = ["plain", 'say "cheese",\nplease', "猫と犬 🐈‍⬛", "x" * 2000, "a\x01b", "plain"]
UTC = datetime.UTC
MAP = pa.map_(pa.string(), pa.int8())
MOMENT = pa.timestamp("us", "UTC")
# A column of each allowed type, with values that loaders get wrong: nulls first, whole floats, empty lists.
COLUMNS: dict[str, tuple[pa.DataType, list[Any]]] = {
    "text": (pa.string(), [None, "", "ü 猫", "null", "1", "2020-01-01"]),
    "flag": (pa.bool_(), [None, True, False, True, None, False]),
    "whole": (pa.int64(), [None, 2**62, -1, 0, 5, 6]),
    "number": (pa.float64(), [1.0, None, 2.5, float("nan"), float("inf"), -0.0]),
    "price": (pa.decimal128(10, 2), [None, *(decimal.Decimal(text) for text in ("1.50", "2", "-3.25", "0", "7"))]),
    "day": (pa.date32(), [None, *[datetime.date(2026, 11, day) for day in range(1, 6)]]),
    "moment": (
        pa.timestamp("us", "UTC"),
        [None, *[datetime.datetime(2026, 1, day, tzinfo=UTC) for day in range(1, 6)]],
    ),
    "span": (pa.duration("ms"), [None, *[datetime.timedelta(seconds=number) for number in range(5)]]),
    "blob": (pa.binary(), [None, b"", b"\x00\xff", b"abc", b"", b"x"]),
    "tags": (pa.list_(pa.string()), [None, [], ["a", None], ["ü"], [], ["b", "c"]]),
    "box": (
        pa.struct([("x", pa.int32()), ("names", pa.list_(pa.string()))]),
        [
            None,
            {"x": 1, "names": ["a"]},
            {"x": None, "names": None},
            {"x": 2, "names": []},
            None,
            {"x": 3, "names": []},
        ],
    ),
    "nothing": (pa.null(), [None] * 6),
    "prompt": (pa.string(), ["shadows", "a", "column", "of", "the", "metadata"]),
    "image": (pa.string(), ["shadows", "the", "image", "of", "Parquet", "files"]),
    "dots.in it": (pa.int64(), [1, 2, 3, 4, 5, 6]),
}
PASSTHROUGH = pa.schema([(name, kind) for name, (kind, _) in COLUMNS.items()])


def make_record(row: int, prompt: str) -> ImageRecord:
    """Return the record of a successful image, with the values of `row` in COLUMNS."""
    values = {name: values[row % len(values)] for name, (_, values) in COLUMNS.items()}
    return ImageRecord(
        key=image_key("00000", row, 0),
        id=f"p.csv:{row}",
        image_index=0,
        prompt=prompt,
        seed=2**53 - 1 - row,
        sampling=SamplingParams(
            width=32,
            height=16,
            num_inference_steps=4,
            embedded_guidance=3.0 if row % 2 else 3.5,
            t5_sequence_length=512,
        ),
        clip_truncated=False,
        t5_truncated=row == 3,
        model="demo",
        status="success",
        passthrough=values,
    )
