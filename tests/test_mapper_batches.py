from __future__ import annotations

import numpy as np
import pyarrow as pa

from flux_batch.mapper import extended, rows_of


def test_rows_are_plain_values_of_the_columns_that_are_there() -> None:
    large = 2**60 + 1  # no float holds it
    rows = [{"prompt": "a", "seed": large}, {"prompt": "b", "seed": None}]
    batch = {"prompt": np.array(["a", "b"]), "seed": np.array([large, None], dtype=object), "other": np.zeros(2)}

    assert rows_of(pa.table({"prompt": ["a", "b"], "seed": [large, None], "other": [0, 0]}), {"prompt", "seed"}) == rows
    assert rows_of(batch, {"prompt", "seed", "absent"}) == rows
    assert rows_of({"seed": np.array([1.5, np.nan])}, {"seed"}) == [{"seed": 1.5}, {"seed": None}]
    assert type(rows_of({"seed": np.array([3])}, {"seed"})[0]["seed"]) is int


def test_columns_take_the_place_of_those_of_their_name() -> None:
    schema = pa.schema([("seed", pa.int64()), ("image", pa.binary())])
    columns = {"seed": [7, None, 9], "image": [b"x", None, b"z"]}

    table = extended(pa.table({"seed": ["a", "b"], "prompt": ["p", "q"]}), [0, 0, 1], columns, schema)

    assert table.schema == pa.schema([("prompt", pa.string()), *schema])
    assert table.to_pydict() == {"prompt": ["p", "p", "q"], **columns}
    of_numpy = extended({"seed": np.array(["a", "b"]), "prompt": ["p", "q"]}, [0, 0, 1], columns, schema)
    assert {name: values.tolist() for name, values in of_numpy.items()} == {"prompt": ["p", "p", "q"], **columns}
