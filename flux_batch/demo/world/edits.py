"""Edits of scenes, and instructions in words: "make the star red"; knows no tokenizer, tensor or image."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from flux_batch.demo.world.captions import (
    COLOURS,
    MIN_CONTRAST,
    SHAPES,
    Background,
    Colour,
    Scene,
    Thing,
    contrast,
    is_held_out,
    pick,
    random_scene,
)

_Change = Literal["colour", "shape", "background"]

# The words of each change; {thing} is the thing before, {} what becomes of it.
_INSTRUCTIONS: dict[_Change, tuple[str, ...]] = {
    "colour": ("make the {thing} {}", "paint the {thing} {}", "change the colour of the {thing} to {}"),
    "shape": ("turn the {thing} into a {}", "replace the {thing} with a {}", "make the {thing} a {}"),
    "background": ("make the background {}", "paint the background {}", "change the background to {}"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Edit:
    """A scene, the same with one fact changed, and the words that ask for it."""

    before: Scene
    after: Scene
    instruction: str


def edits(count: int, seed: int) -> Iterator[Edit]:
    """Yield edits whose scenes training never shows; the same ones for the same seed, on every machine."""
    rng = random.Random(seed)
    while count:
        before = random_scene(rng)
        after = changed(before, rng)
        if after and is_held_out(before) and is_held_out(after):
            yield Edit(before=before, after=after, instruction=instruct(before, after, rng))
            count -= 1


def changed(scene: Scene, rng: random.Random) -> Scene | None:
    """Return the scene with a fact changed at random, in other colours than it has; None where none would do.

    Only plain backgrounds change: all else of an image is then drawn as before.
    """
    changes: tuple[_Change, ...] = ("colour", "colour", "shape", "background")
    change = pick(rng, changes if scene.background.texture == "plain" else changes[:3])
    if change == "background":
        colours = [colour for colour in _unused(scene) if _stands_out(scene, _plain(colour))]
        return replace(scene, background=_plain(pick(rng, colours))) if colours else None
    number = pick(rng, range(len(_things(scene))))
    thing = _things(scene)[number]
    if change == "shape":
        shapes = [shape for shape in SHAPES if all(shape != other.shape for other in _things(scene))]
        return _with(scene, number, replace(thing, shape=pick(rng, shapes)))
    colours = [colour for colour in _unused(scene) if contrast(colour, scene.background) >= MIN_CONTRAST]
    return _with(scene, number, replace(thing, colour=pick(rng, colours))) if colours else None


def instruct(before: Scene, after: Scene, rng: random.Random) -> str:
    """Return words for the one fact in which two scenes differ."""
    if before.background != after.background:
        return pick(rng, _INSTRUCTIONS["background"]).format(after.background.colour)
    old, new = next((old, new) for old, new in zip(_things(before), _things(after), strict=True) if old != new)
    change: _Change = "shape" if old.shape != new.shape else "colour"
    return pick(rng, _INSTRUCTIONS[change]).format(getattr(new, change), thing=_name(old, before))


def _name(thing: Thing, scene: Scene) -> str:
    """Return a thing's shape, with its colour where both things have that shape."""
    is_only = sum(other.shape == thing.shape for other in _things(scene)) == 1
    return thing.shape if is_only else f"{thing.colour} {thing.shape}"


def _with(scene: Scene, number: int, thing: Thing) -> Scene:
    """Return the scene with another first (0) or second thing (1)."""
    return replace(scene, second=thing) if number else replace(scene, first=thing)


def _things(scene: Scene) -> list[Thing]:
    """Return the one or two things of a scene."""
    return [thing for thing in (scene.first, scene.second) if thing]


def _unused(scene: Scene) -> list[Colour]:
    """Return the colours that nothing in a scene has."""
    used = {scene.background.colour, scene.background.second, *(thing.colour for thing in _things(scene))}
    return [colour for colour in COLOURS if colour not in used]


def _plain(colour: Colour) -> Background:
    """Return a background of one colour."""
    return Background(texture="plain", colour=colour)


def _stands_out(scene: Scene, background: Background) -> bool:
    """Return whether all things of a scene contrast with a background."""
    return all(contrast(thing.colour, background) >= MIN_CONTRAST for thing in _things(scene))
