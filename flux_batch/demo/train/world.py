"""What the demo model is trained on: scenes, texts that say all or some of them, the facts in each as numbers."""

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

# How often a training text says nothing, or only a colour, or leaves a fact out.
EMPTY_SHARE = 0.08
BARE_SHARE = 0.06
# Textures are learned long before shapes, so most images are plain.
TEXTURE_SHARES: dict[Texture, float] = {
    "plain": 0.4,
    "gradient": 0.2,
    "striped": 0.15,
    "checkered": 0.125,
    "dotted": 0.125,
}
UNSAID_SHARES: dict[Unsaid, float] = {"colour": 0.04, "place": 0.05, "background": 0.08}

PLACES = (*POSITIONS, *RELATIONS)


class Fact(NamedTuple):
    """A question a text answers; the first answer stands for `not said`."""

    name: str
    answers: tuple[str | None, ...]


FACTS = (
    Fact("first shape", (None, *SHAPES)),
    Fact("first colour", (None, *COLOURS)),
    Fact("first size", (None, *SIZES)),
    Fact("place", (None, *PLACES)),
    Fact("second shape", (None, *SHAPES)),
    Fact("second colour", (None, *COLOURS)),
    Fact("second size", (None, *SIZES)),
    Fact("texture", (None, *TEXTURES)),
    Fact("background colour", (None, *COLOURS)),
    Fact("background second colour", (None, *COLOURS)),
)


@dataclass(frozen=True, slots=True)
class Text:
    """A text, and the place of its answer among those of each of the `FACTS`."""

    words: str
    answers: tuple[int, ...]


def training_scene(rng: random.Random) -> Scene:
    """Draw a scene that may be trained on."""
    texture = rng.choices(list(TEXTURE_SHARES), weights=list(TEXTURE_SHARES.values()))[0]
    while is_held_out(scene := random_scene(rng, texture=texture)):
        pass
    return scene


def training_text(scene: Scene, rng: random.Random, empty_share: float = EMPTY_SHARE) -> Text:
    """Say a scene as users do: mostly in full, sometimes in part, sometimes not at all."""
    kind = rng.random()
    if kind < empty_share:
        return Text("", answers(None))
    if kind < empty_share + BARE_SHARE:
        # Of anything in the image: as a negative prompt it is to keep the colour out of all of it.
        colour = pick(rng, colours_of(scene))
        words = pick(rng, BARE_WORDINGS).format(colour)
        told = [colour if fact.name == "first colour" else None for fact in FACTS]
        return Text(words, indices(told))
    unsaid: frozenset[Unsaid] = frozenset(fact for fact, share in UNSAID_SHARES.items() if rng.random() < share)
    return Text(phrase(scene, pick(rng, range(len(WORDINGS))), unsaid), answers(scene, unsaid))


def colours_of(scene: Scene) -> list[Colour]:
    """Return the colours of the things and of what lies behind them."""
    named = (scene.first.colour, scene.second and scene.second.colour, scene.background.colour, scene.background.second)
    return [colour for colour in named if colour]


def answers(scene: Scene | None, unsaid: frozenset[Unsaid] = frozenset()) -> tuple[int, ...]:
    """Return the places of the answers a text about a scene gives; without a scene it gives none."""
    if scene is None:
        return (0,) * len(FACTS)
    first, second, background = scene.first, scene.second, scene.background
    colour_said, background_said = "colour" not in unsaid, "background" not in unsaid
    return indices(
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


def indices(told: Sequence[str | None]) -> tuple[int, ...]:
    """Return the place of each answer among the possible ones."""
    return tuple(fact.answers.index(answer) for fact, answer in zip(FACTS, told, strict=True))
