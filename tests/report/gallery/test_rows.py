import pytest

from flux_batch.report.gallery.rows import ShardCounts, sample


@pytest.mark.parametrize(
    ("made", "most", "chosen"),
    [
        ([], 5, {}),
        ([0, 0], 5, {}),
        ([3], 5, {0: [0, 1, 2]}),
        ([2, 0, 2], 4, {0: [0, 1], 2: [0, 1]}),
        ([10], 1, {0: [5]}),
        ([100, 100, 100, 100], 4, {0: [50], 1: [50], 2: [50], 3: [50]}),
        ([1, 97, 2], 2, {1: [24, 74]}),
        ([1000], 3, {0: [166, 500, 833]}),
    ],
)
def test_a_sample_is_spread_evenly(made: list[int], most: int, chosen: dict[int, list[int]]) -> None:
    assert sample([ShardCounts(shard, num, 7) for shard, num in enumerate(made)], most) == chosen


@pytest.mark.parametrize("most", [1, 2, 7, 99, 100, 101])
def test_a_sample_has_as_many_as_asked_for_and_none_twice(most: int) -> None:
    counts = [ShardCounts(shard, 10, 0) for shard in range(10)]
    places = [(shard, place) for shard, some in sample(counts, most).items() for place in some]
    assert len(set(places)) == len(places) == min(most, 100)
    assert places == sorted(places)
