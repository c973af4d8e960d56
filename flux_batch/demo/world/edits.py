"""Edits of scenes with one thing, and their instructions, such as "make the star red"."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

from flux_batch.demo.world.captions import (
    COLOURS,
    MIN_CONTRAST,
    SHAPES,
    Background,
    Colour,
    Scene,
    contrast,
    is_held_out,
    pick,
    random_scene,
)

Change = Literal["colour", "shape", "background"]
CHANGES: tuple[Change, ...] = get_args(Change)

# The words of each change; {thing} is the thing's shape before, {} the new value.
_INSTRUCTIONS: dict[Change, tuple[str, ...]] = {
    "colour": ("make the {thing} {}", "paint the {thing} {}", "change the colour of the {thing} to {}"),
    "shape": ("turn the {thing} into a {}", "replace the {thing} with a {}", "make the {thing} a {}"),
    "background": ("make the background {}", "paint the background {}", "change the background to {}"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Edit:
    """A scene of one thing, the same with one fact changed, and words for it."""

    before: Scene
    after: Scene
    instruction: str


def edits(count: int, seed: int) -> Iterator[Edit]:
    """Yield edits, a third of each change; the same seed gives the same edits on every machine.

    Each edit starts or ends with a thing that no training image shows.
    """
    rng = random.Random(seed)
    number = 0
    while number < count:
        before = random_scene(rng, num_things=1)
        after = changed(before, CHANGES[number % len(CHANGES)], rng)
        if after and (is_held_out(before) or is_held_out(after)):
            yield Edit(before=before, after=after, instruction=instruct(before, after, rng))
            number += 1


def changed(scene: Scene, change: Change, rng: random.Random) -> Scene | None:
    """Return a scene with one thing and a fact changed at random; None if no other value is possible.

    Only plain backgrounds change, so that the rest of the image is drawn as before.
    """
    thing, background = scene.first, scene.background
    if change == "shape":
        return replace(
            scene, first=replace(thing, shape=pick(rng, [shape for shape in SHAPES if shape != thing.shape]))
        )
    unused = [colour for colour in COLOURS if colour not in (thing.colour, background.colour, background.second)]
    if change == "colour":
        colours = [colour for colour in unused if contrast(colour, background) >= MIN_CONTRAST]
        return replace(scene, first=replace(thing, colour=pick(rng, colours))) if colours else None
    if background.texture != "plain":
        return None
    colours = [colour for colour in unused if contrast(thing.colour, _plain(colour)) >= MIN_CONTRAST]
    return replace(scene, background=_plain(pick(rng, colours))) if colours else None


def instruct(before: Scene, after: Scene, rng: random.Random) -> str:
    """Return words for the one fact in which two scenes of one thing differ."""
    old, new = before.first, after.first
    if old.shape != new.shape:
        return pick(rng, _INSTRUCTIONS["shape"]).format(new.shape, thing=old.shape)
    if old.colour != new.colour:
        return pick(rng, _INSTRUCTIONS["colour"]).format(new.colour, thing=old.shape)
    return pick(rng, _INSTRUCTIONS["background"]).format(after.background.colour)


def _plain(colour: Colour) -> Background:
    """Return a background of one colour."""
    return Background(texture="plain", colour=colour)
