from __future__ import annotations

import random

import pytest

from flux_batch.demo.world.captions import MIN_CONTRAST, Background, Scene, Thing, contrast, is_held_out
from flux_batch.demo.world.edits import changed, edits, instruct

WHITE = Background(texture="plain", colour="white")
RED_STAR = Thing(shape="star", colour="red", size="small")
BLUE_STAR = Thing(shape="star", colour="blue", size="large")
BLUE_RING = Thing(shape="ring", colour="blue", size="large")


def pair(first: Thing, second: Thing, background: Background = WHITE) -> Scene:
    return Scene(first=first, second=second, relation="above", background=background)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (pair(RED_STAR, BLUE_RING), pair(BLUE_STAR, BLUE_RING), {"star", "blue"}),
        (pair(RED_STAR, BLUE_RING), pair(RED_STAR, BLUE_STAR), {"ring", "star"}),
        (pair(RED_STAR, BLUE_STAR), pair(RED_STAR, BLUE_RING), {"blue", "star", "ring"}),
        (
            pair(RED_STAR, BLUE_RING),
            pair(RED_STAR, BLUE_RING, Background(texture="plain", colour="grey")),
            {"background", "grey"},
        ),
    ],
)
def test_words_name_the_thing_and_what_becomes_of_it(before: Scene, after: Scene, words: set[str]) -> None:
    for seed in range(8):
        assert words <= set(instruct(before, after, random.Random(seed)).split())


def test_edits_change_one_fact_of_scenes_that_training_never_shows() -> None:
    found = list(edits(60, seed=5))

    assert found == list(edits(60, seed=5))
    assert found[:20] != list(edits(20, seed=6))
    parts = ("first", "second", "background")
    changes = [[part for part in parts if getattr(edit.before, part) != getattr(edit.after, part)] for edit in found]
    assert all(len(change) == 1 for change in changes)
    assert {part for change in changes for part in change} == set(parts)
    assert all(is_held_out(scene) for edit in found for scene in (edit.before, edit.after))
    for scene in (edit.after for edit in found):
        things = [thing for thing in (scene.first, scene.second) if thing]
        assert all(contrast(thing.colour, scene.background) >= MIN_CONTRAST for thing in things)
        assert len({thing.colour for thing in things}) == len(things)


def test_only_plain_backgrounds_change() -> None:
    striped = pair(RED_STAR, BLUE_RING, Background(texture="striped", colour="white", second="yellow"))

    for seed in range(40):
        after = changed(striped, random.Random(seed))
        assert after is not None
        assert after.background == striped.background
