"""The training data of the demo model: scenes, texts with all or some of their facts, and facts as numbers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from flux_batch.demo.world.captions import (
    BARE_WORDINGS,
    COLOURS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    WORDINGS,
    Colour,
    Scene,
    Texture,
    Unsaid,
    is_held_out,
    phrase,
    pick,
    random_scene,
)

# Shares of the training texts that are empty, or only name a colour.
_EMPTY_SHARE = 0.08
_BARE_SHARE = 0.06
# Textures are learned long before shapes, so most images are plain.
_TEXTURE_SHARES: dict[Texture, float] = {
    "plain": 0.4,
    "gradient": 0.2,
    "striped": 0.15,
    "checkered": 0.125,
    "dotted": 0.125,
}
_UNSAID_SHARES: dict[Unsaid, float] = {"colour": 0.04, "place": 0.05, "background": 0.08}

_PLACES = (*POSITIONS, *RELATIONS)


class _Fact(NamedTuple):
    """A kind of fact and its possible answers, the first of which is `not stated`."""

    name: str
    answers: tuple[str | None, ...]


FACTS = (
    _Fact("first shape", (None, *SHAPES)),
    _Fact("first colour", (None, *COLOURS)),
    _Fact("first size", (None, *SIZES)),
    _Fact("place", (None, *_PLACES)),
    _Fact("second shape", (None, *SHAPES)),
    _Fact("second colour", (None, *COLOURS)),
    _Fact("second size", (None, *SIZES)),
    _Fact("texture", (None, *TEXTURES)),
    _Fact("background colour", (None, *COLOURS)),
    _Fact("background second colour", (None, *COLOURS)),
)


@dataclass(frozen=True, slots=True)
class _Text:
    """A text, and the index of its answer to each of the `FACTS`."""

    words: str
    answers: tuple[int, ...]


def training_scene(rng: random.Random) -> Scene:
    """Return a random scene that is not held out."""
    texture = rng.choices(list(_TEXTURE_SHARES), weights=list(_TEXTURE_SHARES.values()))[0]
    while is_held_out(scene := random_scene(rng, texture=texture)):
        pass
    return scene


def training_text(scene: Scene, rng: random.Random, empty_share: float = _EMPTY_SHARE) -> _Text:
    """Return a random text about a scene: mostly in full, sometimes in part, sometimes empty."""
    kind = rng.random()
    if kind < empty_share:
        return _Text("", answers(None))
    if kind < empty_share + _BARE_SHARE:
        # The colour of a thing or of the background: as a negative prompt it must exclude it from the whole image.
        colour = pick(rng, _colours_of(scene))
        words = pick(rng, BARE_WORDINGS).format(colour)
        stated = [colour if fact.name == "first colour" else None for fact in FACTS]
        return _Text(words, _indices(stated))
    unsaid: frozenset[Unsaid] = frozenset(fact for fact, share in _UNSAID_SHARES.items() if rng.random() < share)
    return _Text(phrase(scene, pick(rng, range(len(WORDINGS))), unsaid), answers(scene, unsaid))


def _colours_of(scene: Scene) -> list[Colour]:
    """Return the colours of the things and the background."""
    named = (scene.first.colour, scene.second and scene.second.colour, scene.background.colour, scene.background.second)
    return [colour for colour in named if colour]


def answers(scene: Scene | None, unsaid: frozenset[Unsaid] = frozenset()) -> tuple[int, ...]:
    """Return the indices of a text's answers to the facts of its scene; all 0 without a scene."""
    if scene is None:
        return (0,) * len(FACTS)
    first, second, background = scene.first, scene.second, scene.background
    colour_said, background_said = "colour" not in unsaid, "background" not in unsaid
    return _indices(
        [
            first.shape,
            first.colour if colour_said else None,
            first.size,
            (scene.position or scene.relation) if "place" not in unsaid else None,
            second.shape if second else None,
            second.colour if second and colour_said else None,
            second.size if second else None,
            background.texture if background_said else None,
            background.colour if background_said else None,
            background.second if background_said else None,
        ]
    )


def _indices(stated: Sequence[str | None]) -> tuple[int, ...]:
    """Return the index of each answer among the possible ones."""
    return tuple(fact.answers.index(answer) for fact, answer in zip(FACTS, stated, strict=True))
