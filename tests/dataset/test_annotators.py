"""The annotators of pixels and facts, and answers that do not match an annotator's columns."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageFilter

from flux_batch.dataset.annotators.checked import CheckedAnnotator
from flux_batch.dataset.annotators.facts import Facts
from flux_batch.dataset.annotators.pixels import Exposure, PerceptualHash, Sharpness
from flux_batch.demo.world.captions import WORDINGS, Caption, captions, phrase
from flux_batch.demo.world.drawing import draw
from flux_batch.demo.world.parsing import parse_caption
from helpers.annotators import Answers


def noise(seed: int = 0, side: int = 64) -> Image.Image:
    """Return an image with details at every scale."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    fine = np.random.default_rng(seed).integers(0, 60, (side, side, 3), dtype=np.uint8)
    large = np.asarray(Image.fromarray(small).resize((side, side)), dtype=np.int64)
    return Image.fromarray((large * 3 // 4 + fine).astype(np.uint8))


def test_alike_images_have_hashes_that_differ_in_few_bits() -> None:
    images = [noise(), noise().resize((48, 96)), noise().filter(ImageFilter.GaussianBlur(1)), noise(1)]
    first, *others = (int(one, 16) for one in PerceptualHash()(images, [{}] * 4)["phash"])
    resized, blurred, other = ((first ^ one).bit_count() for one in others)
    assert max(resized, blurred) <= 6 < 20 <= other


def test_a_blurred_image_is_less_sharp_and_a_blank_one_is_found() -> None:
    images = [noise(), noise().filter(ImageFilter.GaussianBlur(2)), Image.new("RGB", (32, 32), (255, 250, 252))]
    sharp, blurred, blank = Sharpness()(images, [{}] * 3)["sharpness"]
    assert sharp > 4 * blurred > blank == 0
    columns = Exposure()(images, [{}] * 3)
    assert columns["is_blank"] == [False, False, True]
    assert columns["bright_share"][2] == 1
    assert columns["dark_share"][2] == 0
    assert columns["mean_level"][2] == pytest.approx(252, abs=1)


def test_every_caption_is_parsed_to_the_facts_that_it_states() -> None:
    for number, caption in enumerate(captions(140, 7)):
        assert parse_caption(caption.text).scene == caption.scene
        for unsaid in ({"colour"}, {"place"}, {"background"}, {"colour", "place", "background"}):
            text = phrase(caption.scene, number % len(WORDINGS), frozenset(unsaid))
            parsed = parse_caption(text)
            assert (parsed.unsaid, parsed.scene.first.shape) == (unsaid, caption.scene.first.shape)
    with pytest.raises(ValueError, match="no caption of the demo's world"):
        parse_caption("a cat holding a sign")


def test_facts_are_those_of_the_scorer() -> None:
    caption, other = captions(2, 3)
    columns = Facts()(
        [draw(caption.scene, 128, 128, random.Random(0)), draw(other.scene, 128, 128, random.Random(0))],
        [_said(caption)] * 2,
    )
    assert columns["facts"][0] == 1
    assert columns["missing"][0] == []
    assert columns["facts"][1] < 1
    assert columns["missing"][1]


def _said(caption: Caption) -> dict[str, Any]:
    return {"prompt": caption.text}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda images: None, "returned NoneType; it must return a mapping"),
        (lambda images: [0.5] * len(images), "returned list; it must return a mapping"),
        (lambda images: {"scores": [0.5] * len(images)}, "returned the columns scores; it promises score"),
        (lambda images: {"score": [0.5] * (len(images) + 1)}, "column score has 2 values for 1 images"),
        (lambda images: {"score": ["good"] * len(images)}, "column score is not float: "),
        (lambda images: {"score": 0.5}, "column score is not float: "),
        (lambda images: {"score": "5" * len(images)}, "column score is not float: one text where a list"),
        (lambda images: {"score": pa.array(["good"] * len(images))}, "column score is not float: "),
    ],
)
def test_an_answer_that_was_not_promised_is_a_reason(answer: Callable[..., Any], message: str) -> None:
    checked = CheckedAnnotator(Answers(answer), "mine")
    for found in checked.rows([noise(), noise(1)], [{}, {}]):
        assert type(found) is TypeError  # the annotation shows the name of the type
        assert f"mine{': ' if 'column ' in message else ' '}{message}" in str(found)


@pytest.mark.parametrize(
    "answer",
    [
        lambda images: {"score": [0.5, None][: len(images)]},
        lambda images: {"score": (np.float64(0.5), None)},
        lambda images: {"score": pa.chunked_array([[0.5], [None]], pa.float64())},
        lambda images: pa.table({"score": pa.array([0.5, None])}),
    ],
)
def test_lists_arrays_and_tables_are_answers(answer: Callable[..., Any]) -> None:
    assert CheckedAnnotator(Answers(answer), "mine").rows([noise(), noise(1)], [{}, {}]) == [
        {"score": 0.5},
        {"score": None},
    ]


def test_an_annotator_may_spoil_what_it_is_given() -> None:
    def spoil(images: Any) -> Any:
        for image in images:
            image.paste((0, 0, 0), (0, 0, *image.size))
        raise RuntimeError("spoiled")

    image, record = noise(), {"key": "1"}
    CheckedAnnotator(Answers(spoil), "mine").rows([image, image], [record, record])
    assert np.array_equal(np.asarray(image), np.asarray(noise()))
