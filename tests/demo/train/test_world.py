from __future__ import annotations

import random
from collections import Counter

from flux_batch.demo.train.world import FACTS, answers, training_scene, training_text
from flux_batch.demo.world.captions import Background, Scene, Thing, is_held_out

SCENE = Scene(
    first=Thing(shape="star", colour="red", size="small"),
    relation="above",
    second=Thing(shape="ring", colour="blue", size="large"),
    background=Background(texture="plain", colour="white"),
)


def said(places: tuple[int, ...]) -> dict[str, str]:
    told = {fact.name: fact.answers[place] for fact, place in zip(FACTS, places, strict=True)}
    return {name: answer for name, answer in told.items() if answer is not None}


def test_a_full_text_answers_every_question() -> None:
    assert said(answers(SCENE)) == {
        "first shape": "star",
        "first colour": "red",
        "first size": "small",
        "place": "above",
        "second shape": "ring",
        "second colour": "blue",
        "second size": "large",
        "texture": "plain",
        "background colour": "white",
    }


def test_unsaid_facts_have_no_answer() -> None:
    told = said(answers(SCENE, frozenset({"colour", "place", "background"})))

    assert told == {"first shape": "star", "first size": "small", "second shape": "ring", "second size": "large"}


def test_an_empty_text_answers_nothing() -> None:
    text = training_text(SCENE, random.Random(0), empty_share=1.0)

    assert (text.words, said(text.answers)) == ("", {})


def test_texts_contain_their_labels() -> None:
    rng = random.Random(1)
    for _ in range(500):
        scene = training_scene(rng)
        text = training_text(scene, rng)
        told = said(text.answers)
        words = text.words.replace(",", " ").split()
        assert all(told[fact] in words for fact in told if "colour" in fact or "shape" in fact)


def test_no_training_scene_is_held_out() -> None:
    rng = random.Random(2)

    assert not any(is_held_out(training_scene(rng)) for _ in range(2000))


def test_some_texts_are_empty_and_some_bare() -> None:
    rng = random.Random(3)
    lengths = Counter(len(said(training_text(SCENE, rng).answers)) for _ in range(2000))

    assert 120 < lengths[0] < 280
    assert 60 < lengths[1] < 180
    assert lengths[9] > 1000
