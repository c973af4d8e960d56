from __future__ import annotations

import numpy as np
import pytest

from flux_batch.demo.world.regions import Region, components, grown, label, opened, shrunk


def region(*rows: str) -> Region:
    return np.array([[pixel == "#" for pixel in row] for row in rows])


def test_parts_that_touch_at_a_corner_are_one() -> None:
    labels = label(region("##..#", "..#..", ".....", "#...#"))

    assert labels.max() == 4
    assert labels[0, 0] == labels[1, 2]
    assert len({labels[0, 0], labels[3, 0], labels[3, 4]}) == 3


def test_a_part_that_joins_two_makes_them_one() -> None:
    assert label(region("#.#.#", "#.#.#", "#####")).max() == 1
    assert label(region("#####", "#...#", "#.#.#", "#...#", "#####")).max() == 2


def test_an_empty_region_has_no_parts() -> None:
    assert list(components(region("...", "..."), 1)) == []


def test_small_parts_are_left_out() -> None:
    (part,) = components(region("##..", "##..", "...#"), 2)

    assert part.sum() == 4


@pytest.mark.parametrize("by", [1, 2])
def test_growing_and_shrinking_undo_each_other_on_a_block(by: int) -> None:
    block = np.zeros((12, 12), bool)
    block[5:8, 4:9] = True

    assert grown(block, by).sum() == (3 + 2 * by) * (5 + 2 * by)
    assert np.array_equal(shrunk(grown(block, by), by), block)


def test_opening_removes_lines_and_keeps_blocks() -> None:
    image = np.zeros((12, 12), bool)
    image[2:7, 2:7] = True
    image[10] = True

    kept = opened(image)

    assert kept[2:7, 2:7].all()
    assert not kept[10].any()
