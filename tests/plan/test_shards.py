from __future__ import annotations

import pytest

from flux_batch.plan.shards import Shards
from flux_batch.records import FileRange, Shard

PARTS = [
    [FileRange(uri="s3://b/a", name="a", start=0, num_rows=4)],
    [FileRange(uri="s3://b/a", name="a", start=4, num_rows=1), FileRange(uri="/b", name="b", start=0, num_rows=2)],
    [FileRange(uri="/c.txt", name="c.txt", start=10**9, num_rows=3, offset=10**12)],
]
SHARDS = [Shard(index=index, parts=tuple(parts)) for index, parts in enumerate(PARTS)]


def test_columns_give_back_every_shard() -> None:
    shards = Shards.none().extended(PARTS)

    assert list(shards) == SHARDS
    assert [shards[0], shards[-1]] == [SHARDS[0], SHARDS[2]]
    assert shards == SHARDS
    assert shards != SHARDS[:2]
    assert (shards.num_rows, shards.files) == (10, ["a", "b", "c.txt"])
    with pytest.raises(IndexError):
        shards[3]


def test_shards_left_keep_their_numbers_and_order() -> None:
    shards = Shards.none().extended(PARTS)

    assert shards.without([1, 0, 0]) == SHARDS[1:]
    assert shards.without([0, 1, 0])[1:] == SHARDS[2:]
    assert not shards.without([1, 1, 1])
    assert not Shards.none()


def test_new_shards_are_numbered_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flux_batch.plan.shards.ROWS_AT_ONCE", 1)  # one block per part

    assert Shards.none().extended(PARTS[:1]).extended(PARTS[1:]) == SHARDS
