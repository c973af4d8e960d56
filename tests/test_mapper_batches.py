from __future__ import annotations

import numpy as np
import pyarrow as pa

from flux_batch.mapper import rows_of, with_columns


def test_rows_hold_plain_values_of_the_requested_columns() -> None:
    large = 2**60 + 1  # no float holds it
    rows = [{"prompt": "a", "seed": large}, {"prompt": "b", "seed": None}]
    batch = {"prompt": np.array(["a", "b"]), "seed": np.array([large, None], dtype=object), "other": np.zeros(2)}

    assert rows_of(pa.table({"prompt": ["a", "b"], "seed": [large, None], "other": [0, 0]}), {"prompt", "seed"}) == rows
    assert rows_of(batch, {"prompt", "seed", "absent"}) == rows
    assert rows_of({"seed": np.array([1.5, np.nan])}, {"seed"}) == [{"seed": 1.5}, {"seed": None}]
    assert type(rows_of({"seed": np.array([3])}, {"seed"})[0]["seed"]) is int


def test_new_columns_replace_those_of_the_same_name() -> None:
    schema = pa.schema([("seed", pa.int64()), ("image", pa.binary())])
    columns = {"seed": [7, None, 9], "image": [b"x", None, b"z"]}

    table = with_columns(pa.table({"seed": ["a", "b"], "prompt": ["p", "q"]}), [0, 0, 1], columns, schema)

    assert table.schema == pa.schema([("prompt", pa.string()), *schema])
    assert table.to_pydict() == {"prompt": ["p", "p", "q"], **columns}
    in_numpy = with_columns({"seed": np.array(["a", "b"]), "prompt": ["p", "q"]}, [0, 0, 1], columns, schema)
    assert {name: values.tolist() for name, values in in_numpy.items()} == {"prompt": ["p", "p", "q"], **columns}
