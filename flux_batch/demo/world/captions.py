"""Scenes of one or two shapes, and captions of them.

A `Scene` holds every fact of an image, a `Caption` states all or some of them. Drawing and reading of images use the
same facts.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

Shape = Literal["circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond"]
Colour = Literal["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey"]
Size = Literal["small", "medium", "large"]
Position = Literal[
    "centre", "top", "bottom", "left", "right", "top left", "top right", "bottom left", "bottom right"
]  # fmt: skip
Relation = Literal["left of", "right of", "above", "below"]
Texture = Literal["plain", "gradient", "striped", "checkered", "dotted"]
Unsaid = Literal["colour", "place", "background"]
_Rgb = tuple[int, int, int]
_Option = TypeVar("_Option")

# The seed of the captions for scoring a model.
SCORED_SEED = 2000

SHAPES: tuple[Shape, ...] = get_args(Shape)
COLOURS: tuple[Colour, ...] = get_args(Colour)
SIZES: tuple[Size, ...] = get_args(Size)
POSITIONS: tuple[Position, ...] = get_args(Position)
RELATIONS: tuple[Relation, ...] = get_args(Relation)
TEXTURES: tuple[Texture, ...] = get_args(Texture)

# The sRGB values of each colour word.
PALETTE: dict[Colour, _Rgb] = {
    "red": (218, 40, 40),
    "orange": (246, 140, 30),
    "yellow": (250, 222, 60),
    "green": (46, 160, 70),
    "blue": (45, 85, 205),
    "purple": (130, 55, 170),
    "pink": (246, 150, 192),
    "brown": (122, 74, 40),
    "black": (24, 24, 28),
    "white": (248, 248, 246),
    "grey": (142, 144, 148),
}
# The least distance of a thing from its background, in units of 8-bit RGB.
MIN_CONTRAST = 75.0

# Variants of the words for each fact; a wording uses the variant with its number everywhere.
SIZE_WORDS: dict[Size, tuple[str, ...]] = {
    "small": ("small ", "little ", "tiny "),
    "medium": ("", "medium-sized "),
    "large": ("large ", "big ", "huge "),
}
POSITION_WORDS: dict[Position, tuple[str, ...]] = {
    "centre": ("in the centre", "in the middle"),
    "top": ("at the top", "near the top edge"),
    "bottom": ("at the bottom", "near the bottom edge"),
    "left": ("on the left", "near the left edge"),
    "right": ("on the right", "near the right edge"),
    "top left": ("in the top left corner", "at the top left"),
    "top right": ("in the top right corner", "at the top right"),
    "bottom left": ("in the bottom left corner", "at the bottom left"),
    "bottom right": ("in the bottom right corner", "at the bottom right"),
}
RELATION_WORDS: dict[Relation, tuple[str, ...]] = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
WORDINGS = (
    "{subject} on {background}",
    "a picture of {subject} on {background}",
    "on {background}, {subject}",
    "a drawing that shows {subject}, {background}",
    "{subject} in front of {background}",
    "a simple image of {subject} against {background}",
    "there is {subject} on {background}",
)


WORDINGS_WITHOUT_BACKGROUND = (
    "{subject}",
    "a picture of {subject}",
    "a drawing that shows {subject}",
    "there is {subject}",
)
# Texts that only name a colour, as users write negative prompts.
BARE_WORDINGS = ("{}", "{} things", "something {}", "a {} shape")


@dataclass(frozen=True, kw_only=True, slots=True)
class Thing:
    """One shape in an image."""

    shape: Shape
    colour: Colour
    size: Size


@dataclass(frozen=True, kw_only=True, slots=True)
class Background:
    """The background of an image; `second` is the other colour of all textures but a plain one."""

    texture: Texture
    colour: Colour
    second: Colour | None = None

    def __post_init__(self) -> None:
        if (self.texture == "plain") != (self.second is None):
            raise ValueError(
                f"a plain background must have no second colour, others must have one: {self.texture}, {self.second}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """All facts of a caption: one thing at a position, or two things of which the first is `relation` the second."""

    first: Thing
    background: Background
    position: Position | None = None
    relation: Relation | None = None
    second: Thing | None = None

    def __post_init__(self) -> None:
        if (self.relation is None) != (self.second is None) or (self.position is None) != (self.second is not None):
            raise ValueError("a scene has one thing with a position, or two things with a relation")


@dataclass(frozen=True, kw_only=True, slots=True)
class Caption:
    """A text, the scene that it describes, and the facts that it leaves out."""

    text: str
    scene: Scene
    unsaid: frozenset[Unsaid] = frozenset()


def captions(count: int, seed: int, *, held_out: bool = False) -> Iterator[Caption]:
    """Yield captions that state all facts; the same seed gives the same captions on every machine.

    held_out: True yields only captions with a thing that no training image shows, False only captions without one.
    """
    rng = random.Random(seed)
    while count:
        scene = random_scene(rng)
        text = phrase(scene, pick(rng, range(len(WORDINGS))))
        if is_held_out(scene) == held_out:
            yield Caption(text=text, scene=scene)
            count -= 1


def is_held_out(scene: Scene) -> bool:
    """Return whether a scene has a shape in its held-out colour, absent from training."""
    things = [thing for thing in (scene.first, scene.second) if thing]
    return any((COLOURS.index(thing.colour) + 3 * SHAPES.index(thing.shape)) % len(COLOURS) == 0 for thing in things)


def random_scene(rng: random.Random, *, num_things: int | None = None, texture: Texture | None = None) -> Scene:
    """Return a random scene, all colours different and each thing in contrast to the background."""
    number = num_things or pick(rng, (1, 2))
    background_texture: Texture = pick(rng, TEXTURES) if texture is None else texture
    while True:
        colours = pick_distinct(rng, COLOURS, 4)
        background = _make_background(background_texture, colours[2], colours[3])
        if all(contrast(colour, background) >= MIN_CONTRAST for colour in colours[:number]):
            break
    first = _random_thing(rng, colours[0])
    if number == 1:
        return Scene(first=first, background=background, position=pick(rng, POSITIONS))
    second = _random_thing(rng, colours[1])
    return Scene(first=first, background=background, relation=pick(rng, RELATIONS), second=second)


def _make_background(texture: Texture, colour: Colour, second: Colour) -> Background:
    """Return a background; a plain one ignores the second colour."""
    return Background(texture=texture, colour=colour, second=None if texture == "plain" else second)


def _random_thing(rng: random.Random, colour: Colour) -> Thing:
    """Return a random thing of a colour."""
    return Thing(shape=pick(rng, SHAPES), colour=colour, size=pick(rng, SIZES))


def contrast(colour: Colour, background: Background) -> float:
    """Return the least distance in RGB between a colour and a background. A gradient counts with all its mixtures."""
    start = PALETTE[background.colour]
    end = PALETTE[background.second or background.colour]
    shares = [step / 16 for step in range(17)] if background.texture == "gradient" else [0.0, 1.0]
    mixtures = [tuple(a + (b - a) * share for a, b in zip(start, end, strict=True)) for share in shares]
    return min(math.dist(PALETTE[colour], mixture) for mixture in mixtures)


def phrase(scene: Scene, wording: int = 0, unsaid: frozenset[Unsaid] = frozenset()) -> str:
    """Return the caption of a scene in one of the `WORDINGS`, without the `unsaid` facts."""
    subject = _name_thing(scene.first, wording, unsaid)
    if scene.position is not None and "place" not in unsaid:
        subject += f" {_variant(POSITION_WORDS[scene.position], wording)}"
    if scene.relation is not None and scene.second is not None:
        relation = "and" if "place" in unsaid else _variant(RELATION_WORDS[scene.relation], wording)
        subject += f" {relation} {_name_thing(scene.second, wording, unsaid)}"
    if "background" in unsaid:
        return _variant(WORDINGS_WITHOUT_BACKGROUND, wording).format(subject=subject)
    return WORDINGS[wording].format(subject=subject, background=_name_background(scene.background, wording))


def _name_thing(thing: Thing, wording: int, unsaid: frozenset[Unsaid] = frozenset()) -> str:
    """Return the words for a thing, e.g. `a small red star`."""
    colour = "" if "colour" in unsaid else f"{thing.colour} "
    return _with_article(f"{_variant(SIZE_WORDS[thing.size], wording)}{colour}{thing.shape}")


def _name_background(background: Background, wording: int) -> str:
    """Return the words for a background, e.g. `a checkered black and white background`."""
    if background.second is None:
        return _with_article(_variant(("plain {} background", "{} background"), wording).format(background.colour))
    if background.texture == "gradient":
        spelling = _variant(("a gradient from {} to {}", "a background that fades from {} to {}"), wording)
        return spelling.format(background.colour, background.second)
    return _with_article(f"{background.texture} {background.colour} and {background.second} background")


def _with_article(words: str) -> str:
    """Return words with `a` or `an` before them."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _variant(spellings: Sequence[str], wording: int) -> str:
    """Return the one of several words that a wording uses."""
    return spellings[wording % len(spellings)]


# Every choice uses random(), the only method whose numbers Python guarantees to stay the same.


def pick(rng: random.Random, options: Sequence[_Option]) -> _Option:
    """Return one of the options."""
    return options[int(rng.random() * len(options))]


def pick_distinct(rng: random.Random, options: Sequence[_Option], count: int) -> list[_Option]:
    """Return `count` different options in random order."""
    left = list(options)
    return [left.pop(int(rng.random() * len(left))) for _ in range(count)]
