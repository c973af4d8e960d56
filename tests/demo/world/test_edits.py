from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from flux_batch.demo.world.captions import MIN_CONTRAST, Background, Scene, Thing, contrast, is_held_out
from flux_batch.demo.world.edits import CHANGES, Change, changed, edits, instruct

RED_STAR = Thing(shape="star", colour="red", size="small")
SCENE = Scene(first=RED_STAR, position="top", background=Background(texture="plain", colour="white"))


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (replace(SCENE, first=replace(RED_STAR, colour="blue")), {"star", "blue"}),
        (replace(SCENE, first=replace(RED_STAR, shape="ring")), {"star", "ring"}),
        (replace(SCENE, background=Background(texture="plain", colour="grey")), {"background", "grey"}),
    ],
)
def test_words_name_what_changes_and_what_becomes_of_it(after: Scene, words: set[str]) -> None:
    for seed in range(8):
        assert words <= set(instruct(SCENE, after, random.Random(seed)).split())


def test_edits_change_one_fact_of_one_thing_and_are_a_third_of_each_kind() -> None:
    found = list(edits(60, seed=5))

    assert found == list(edits(60, seed=5))
    assert found[:20] != list(edits(20, seed=6))
    kinds = Counter(
        (
            edit.before.first.shape != edit.after.first.shape,
            edit.before.first.colour != edit.after.first.colour,
            edit.before.background != edit.after.background,
        )
        for edit in found
    )
    assert kinds == {(True, False, False): 20, (False, True, False): 20, (False, False, True): 20}
    assert not any(edit.before.second for edit in found)
    for scene in (edit.after for edit in found):
        assert contrast(scene.first.colour, scene.background) >= MIN_CONTRAST


def test_every_edit_begins_or_ends_with_a_thing_that_training_never_shows() -> None:
    assert all(is_held_out(edit.before) or is_held_out(edit.after) for edit in edits(60, seed=5))


@pytest.mark.parametrize("change", CHANGES)
def test_all_but_what_changes_stays(change: Change) -> None:
    for seed in range(20):
        after = changed(SCENE, change, random.Random(seed))
        assert after is not None
        assert after != SCENE
        assert (after.position, after.first.size) == ("top", "small")


def test_only_plain_backgrounds_change() -> None:
    striped = replace(SCENE, background=Background(texture="striped", colour="white", second="yellow"))

    assert changed(striped, "background", random.Random(1)) is None
