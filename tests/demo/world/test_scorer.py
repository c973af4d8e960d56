"""The scorer on images drawn from known facts."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from flux_batch.demo.world import scorer
from flux_batch.demo.world.captions import (
    COLOURS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Background,
    Caption,
    Scene,
)
from flux_batch.demo.world.captions import captions as say
from flux_batch.demo.world.drawing import draw
from flux_batch.demo.world.reading import Reading, read_image
from flux_batch.demo.world.scorer import Fact, Kind, score, score_all

CAPTIONS = [*say(36, seed=11), *say(36, seed=12, held_out=True)]


@pytest.fixture(scope="module", autouse=True)
def _read_once() -> Iterator[None]:
    """Read each image only once, since reading is slow and independent of the captions."""
    known: dict[int, tuple[Image.Image, Reading]] = {}

    def read_once(image: Image.Image) -> Reading:
        if id(image) not in known:
            known[id(image)] = image, read_image(image)
        return known[id(image)][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorer, "read_image", read_once)
        yield


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """The images of CAPTIONS."""
    return list(drawn(CAPTIONS))


@pytest.mark.parametrize("size", [(128, 128), (192, 128), (128, 192), (160, 160), (96, 96), (256, 256), (100, 160)])
def test_a_drawn_scene_is_read_back(images: list[Image.Image], size: tuple[int, int]) -> None:
    captions = CAPTIONS if size == (128, 128) else CAPTIONS[::3]
    scores = score_all(captions, images if size == (128, 128) else drawn(captions, size))

    assert scores.share() >= 0.99, str(scores)
    assert min(scores.share(kind) for kind in scores.to_dict()["by_kind"]) >= 0.98


@pytest.mark.parametrize("kind", ["blurred", "noisy", "jpeg"])
def test_a_slightly_damaged_image_is_read_too(images: list[Image.Image], kind: str) -> None:
    scores = score_all(CAPTIONS[::2], (spoil(image, kind) for image in images[::2]))

    assert scores.share() >= 0.97, str(scores)


@pytest.mark.parametrize("kind", ["shape", "colour", "size", "position", "relation", "texture", "background colour"])
def test_one_wrong_word_is_one_fact_that_does_not_hold(images: list[Image.Image], kind: Kind) -> None:
    rng = random.Random(5)
    found = []
    for caption, image in zip(CAPTIONS, images, strict=True):
        if wrong := with_one_wrong(caption, kind, rng):
            found.append([fact.kind for fact in score(wrong, image) if not fact.holds] == [kind])

    assert len(found) >= 10
    assert sum(found) >= 0.99 * len(found)


def test_a_thing_too_many_or_too_few_is_a_wrong_count() -> None:
    pair = next(caption for caption in CAPTIONS if caption.scene.second)
    (image,) = drawn([pair])
    alone = replace(pair, scene=replace(pair.scene, relation=None, second=None, position="left"))

    assert Fact("count", "1", "2", False) in score(alone, image)
    (of_one,) = drawn([alone])
    facts = score(pair, of_one)
    assert Fact("count", "2", "1", False) in facts
    # All facts about the missing thing are wrong too: shape, colour, size and relation.
    assert sum(not fact.holds for fact in facts) == 5


def test_a_fact_left_out_of_a_caption_does_not_count() -> None:
    (image,) = drawn(CAPTIONS[:1])
    silent = replace(CAPTIONS[0], unsaid=frozenset(["colour", "place", "background"]))

    assert {fact.kind for fact in score(silent, image)} == {"count", "shape", "size"}


@pytest.mark.parametrize(
    "image",
    [
        Image.new("RGB", (128, 128), (246, 140, 30)),
        Image.new("L", (40, 300), 128),
        Image.new("RGBA", (16, 16), (0, 0, 0, 0)),
        Image.effect_noise((128, 128), 200).convert("RGB"),
        Image.radial_gradient("L").convert("P"),
        Image.new("RGB", (1, 1)),
        Image.effect_mandelbrot((1024, 768), (-3, -2.5, 2, 2.5), 100).convert("RGB"),
    ],
    ids=["plain", "grey", "transparent", "noise", "palette", "pixel", "mandelbrot"],
)
def test_any_image_can_be_scored(image: Image.Image) -> None:
    assert {fact.holds for fact in score(CAPTIONS[0], image) if fact.kind == "shape"} == {False}


def test_images_and_captions_come_in_pairs() -> None:
    with pytest.raises(ValueError, match="zip"):
        score_all(CAPTIONS[:2], drawn(CAPTIONS[:1]))


def test_scores_are_shares() -> None:
    image = next(iter(drawn(CAPTIONS[:1])))
    facts = score_all([CAPTIONS[0], CAPTIONS[1]], [image, image]).to_dict()

    assert facts["num_images"] == 2
    assert facts["by_kind"]["count"] in (0.5, 1.0)
    assert 0.5 <= facts["share"] < 1


def drawn(captions: list[Caption], size: tuple[int, int] = (128, 128)) -> Iterator[Image.Image]:
    rng = random.Random(3)
    return (draw(caption.scene, *size, rng) for caption in captions)


def spoil(image: Image.Image, kind: str) -> Image.Image:
    if kind == "blurred":
        return image.filter(ImageFilter.GaussianBlur(1.0))
    if kind == "noisy":
        noise = np.random.default_rng(0).normal(0, 8, (*image.size[::-1], 3))
        return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=60)
    return Image.open(file)


def with_one_wrong(caption: Caption, kind: Kind, rng: random.Random) -> Caption | None:
    """Return the caption with one wrong fact of a kind.

    Returns None if the caption has no such fact, or if the change might still be right.
    """
    scene, first = caption.scene, caption.scene.first
    changes: dict[str, Scene | None] = {
        "position": replace(scene, position=another(POSITIONS, scene.position, rng)) if scene.position else None,
        "relation": replace(scene, relation=another(RELATIONS, scene.relation, rng)) if scene.relation else None,
    }
    if scene.second is None:  # with two things, a changed one may match the other
        changes |= {
            "shape": replace(scene, first=replace(first, shape=another(SHAPES, first.shape, rng))),
            "colour": replace(scene, first=replace(first, colour=another(COLOURS, first.colour, rng))),
            "size": replace(scene, first=replace(first, size=another(SIZES, first.size, rng))),
        }
    behind = scene.background
    if behind.second:
        texture = another(tuple(set(TEXTURES) - {"plain"}), behind.texture, rng)
        if "gradient" not in (texture, behind.texture):  # in a gradient, the order of the colours matters too
            changes["texture"] = replace(scene, background=replace(behind, texture=texture))
        other = another(tuple(set(COLOURS) - {behind.second}), behind.colour, rng)
        changes["background colour"] = replace(scene, background=replace(behind, colour=other))
    else:
        other = another(COLOURS, behind.colour, rng)
        changes["background colour"] = replace(scene, background=Background(texture="plain", colour=other))
    changed = changes.get(kind)
    return replace(caption, scene=changed) if changed else None


def another(options: tuple, said: object, rng: random.Random):  # type: ignore[no-untyped-def,type-arg]
    return rng.choice(sorted(set(options) - {said}))
