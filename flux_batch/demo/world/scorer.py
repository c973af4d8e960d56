"""Tells which facts of a caption hold in an image, and sums them up; knows no model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, Literal, get_args

from PIL import Image

from flux_batch.demo.world.captions import POSITIONS, Caption, Position, Relation, Scene, Thing
from flux_batch.demo.world.drawing import CENTRES
from flux_batch.demo.world.reading import Reading, ReadThing, read_image

Kind = Literal["count", "shape", "colour", "size", "position", "relation", "texture", "background colour"]

KINDS: tuple[Kind, ...] = get_args(Kind)
# Things that are compared with those of a caption: the largest ones.
MAX_COMPARED = 6
# How far apart, in shares of the image, two things of a relation must be.
MIN_APART = 0.15


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact of a caption: what it says, what the image shows (empty if nothing), and whether that is the same."""

    kind: Kind
    said: str
    shown: str
    holds: bool


@dataclass(frozen=True)
class Scores:
    """How many facts of captions hold in their images."""

    num_images: int
    facts: tuple[Fact, ...]

    def share(self, kind: Kind | None = None) -> float:
        """Return the share of facts, 0 to 1, of one kind or of all, that hold; 1 if there are none."""
        found = [fact.holds for fact in self.facts if kind in (None, fact.kind)]
        return sum(found) / len(found) if found else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return the shares for JSON."""
        return {
            "num_images": self.num_images,
            "num_facts": len(self.facts),
            "share": round(self.share(), 4),
            "by_kind": {kind: round(self.share(kind), 4) for kind in self._kinds()},
        }

    def __str__(self) -> str:
        lines = [f"{'fact':<18} {'said':>6} {'hold':>6} {'share':>8}"]
        for kind in [*self._kinds(), None]:
            found = [fact.holds for fact in self.facts if kind in (None, fact.kind)]
            lines.append(f"{kind or 'all':<18} {len(found):>6} {sum(found):>6} {100 * self.share(kind):>6.1f} %")
        return "\n".join(lines)

    def _kinds(self) -> list[Kind]:
        return [kind for kind in KINDS if any(fact.kind == kind for fact in self.facts)]


def score_all(captions: Iterable[Caption], images: Iterable[Image.Image]) -> Scores:
    """Score images against their captions, in the same order. Raises: ValueError if their numbers differ."""
    scored = [score(caption, image) for caption, image in zip(captions, images, strict=True)]
    return Scores(len(scored), tuple(fact for facts in scored for fact in facts))


def score(caption: Caption, image: Image.Image) -> list[Fact]:
    """Return every fact that a caption says, and whether it holds in an image."""
    return compare(caption, read_image(image))


def compare(caption: Caption, reading: Reading) -> list[Fact]:
    """Compare a caption with what was read. What it leaves unsaid is no fact.

    Which thing is which is not in an image: of all ways to take them, the one in which most facts hold counts.
    """
    said = [thing for thing in (caption.scene.first, caption.scene.second) if thing]
    facts = [make_fact("count", str(len(said)), str(len(reading.things)))]
    ways = (list(facts_of_things(caption, shown)) for shown in assignments(reading.things, len(said)))
    facts += max(ways, key=lambda way: sum(fact.holds for fact in way))
    if "background" not in caption.unsaid:
        facts += facts_of_background(caption.scene, reading)
    return facts


def assignments(things: Sequence[ReadThing], count: int) -> Iterator[tuple[ReadThing | None, ...]]:
    """Yield every way to take `count` things; None stands in for those that are missing."""
    missing = [None] * max(count - len(things), 0)
    yield from permutations([*things[:MAX_COMPARED], *missing], count)


def facts_of_things(caption: Caption, shown: Sequence[ReadThing | None]) -> Iterator[Fact]:
    """Yield the facts about the things of a caption if these are they."""
    scene = caption.scene
    yield from facts_of_thing(caption, scene.first, shown[0])
    if scene.second:
        yield from facts_of_thing(caption, scene.second, shown[1])
    if "place" in caption.unsaid:
        return
    if scene.position:
        yield make_fact("position", scene.position, position_of(shown[0]) if shown[0] else "")
    if scene.relation:
        yield make_fact("relation", scene.relation, relation_of(shown[0], shown[1]) if shown[0] and shown[1] else "")


def facts_of_thing(caption: Caption, said: Thing, shown: ReadThing | None) -> Iterator[Fact]:
    """Yield the facts about one thing."""
    yield make_fact("shape", said.shape, shown.shape if shown else None)
    if "colour" not in caption.unsaid:
        yield make_fact("colour", said.colour, shown.colour if shown else None)
    yield make_fact("size", said.size, shown.size if shown else None)


def facts_of_background(scene: Scene, reading: Reading) -> Iterator[Fact]:
    """Yield the facts about what lies behind; the order of its colours counts where it runs from top to bottom."""
    said, shown = scene.background, reading.background
    yield make_fact("texture", said.texture, shown.texture if shown else None)
    seen = (shown.colour, shown.second) if shown else (None, None)
    is_ordered = said.texture == "gradient" and shown is not None and shown.texture == "gradient"
    for place, colour in enumerate((said.colour, said.second)):
        if colour:
            one = seen[place] if is_ordered or colour not in seen else colour
            yield make_fact("background colour", colour, one)


def make_fact(kind: Kind, said: str, shown: str | None) -> Fact:
    """Make a fact, which holds if what is shown is what is said."""
    return Fact(kind, said, shown or "", said == shown)


def position_of(thing: ReadThing) -> Position:
    """Name the position nearest to a thing's centre."""
    return min(POSITIONS, key=lambda name: (CENTRES[name][0] - thing.x) ** 2 + (CENTRES[name][1] - thing.y) ** 2)


def relation_of(first: ReadThing, second: ReadThing) -> Relation | None:
    """Name how the first thing stands to the second, along the axis on which they are further apart."""
    x, y = first.x - second.x, first.y - second.y
    if max(abs(x), abs(y)) < MIN_APART:
        return None
    if abs(x) > abs(y):
        return "left of" if x < 0 else "right of"
    return "above" if y < 0 else "below"
