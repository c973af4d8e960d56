from __future__ import annotations

import io
import re
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flux_batch.config.schema import ImageConfig
from flux_batch.images import AI_SOURCE_TYPE, SUFFIXES, Pixels, decode, difference, encode, read_provenance
from helpers.fakes import fake_image

TYPES = ["png", "jpeg", "webp"]
HOSTILE = [
    "plain",
    "",
    "say \"cheese\" & 'smile' <b>]]></b>",
    "two\nlines\r\nand\ttabs",
    "猫と犬 🐈‍⬛ e\u0301 \u202eright to left",
    "".join(map(chr, range(32))) + "\x7f\x80\x9f\ufeff\ufffe\uffff\u2028",
    "p" * 2000,
    "🐈" * 2000,
    '"' * 2000,
]
IPTC = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"


def provenance(prompt: str, **settings: Any) -> dict[str, Any]:
    return {
        "key": "000010002",
        "prompt": prompt,
        "negative_prompt": prompt,
        "seed": 2**53 - 1,
        "cfg_scale": 1.5,
    } | settings


def image(width: int = 48, height: int = 32) -> Pixels:
    return fake_image("p", width=width, height=height)


def encoded(image_type: str, prompt: str = "a cat", **settings: Any) -> bytes:
    return encode(image(), ImageConfig(type=image_type), provenance(prompt, **settings))  # type: ignore[arg-type]


def xmp_of(data: bytes) -> ElementTree.Element:
    """Return the parsed XMP packet, in which readers of labels look."""
    with Image.open(io.BytesIO(data)) as opened:
        packet = opened.info.get("xmp") or opened.info["XML:com.adobe.xmp"]
    root = ElementTree.fromstring(packet)
    (description,) = root.iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    return description


@pytest.mark.parametrize("image_type", TYPES)
@pytest.mark.parametrize("prompt", HOSTILE, ids=range(len(HOSTILE)))
def test_provenance_survives_encoding(image_type: str, prompt: str) -> None:
    data = encoded(image_type, prompt)

    assert read_provenance(data) == provenance(prompt)
    with Image.open(io.BytesIO(data)) as opened:
        opened.load()
        assert (opened.format, opened.size, opened.mode) == (image_type.upper(), (48, 32), "RGB")


@pytest.mark.parametrize("image_type", TYPES)
@settings(max_examples=50)
@given(prompt=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_prompt_can_be_embedded(image_type: str, prompt: str) -> None:
    data = encoded(image_type, prompt)

    assert read_provenance(data)["prompt"] == prompt
    xmp_of(data)


@pytest.mark.parametrize("image_type", TYPES)
@pytest.mark.parametrize("prompt", HOSTILE, ids=range(len(HOSTILE)))
def test_every_image_is_labelled_as_ai_generated(image_type: str, prompt: str) -> None:
    description = xmp_of(encoded(image_type, prompt))

    assert description.get(f"{IPTC}DigitalSourceType") == AI_SOURCE_TYPE
    assert AI_SOURCE_TYPE.endswith("/trainedAlgorithmicMedia")
    speakable = re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]", "", prompt)
    assert description.get(f"{IPTC}AIPromptInformation") == speakable


@pytest.mark.parametrize("image_type", TYPES)
def test_program_and_prompt_stand_in_the_standard_fields(image_type: str) -> None:
    with Image.open(io.BytesIO(encoded(image_type, "a café"))) as opened:
        opened.load()
        if image_type == "png":
            found = (opened.text["Description"], opened.text["Software"])  # type: ignore[attr-defined]
            assert found == ("a café", "flux-batch (AI generated)")
        else:
            exif = opened.getexif()
            assert (exif[0x010E], exif[0x0131]) == ("a caf?", "flux-batch (AI generated)")


@pytest.mark.parametrize("image_type", TYPES)
def test_the_same_image_gives_the_same_bytes(image_type: str) -> None:
    assert encoded(image_type) == encoded(image_type)
    assert encoded(image_type) != encoded(image_type, seed=2)


def test_png_is_lossless() -> None:
    with Image.open(io.BytesIO(encoded("png"))) as opened:
        assert np.array_equal(np.asarray(opened), image())


@pytest.mark.parametrize("image_type", ["jpeg", "webp"])
def test_quality_decides_the_size(image_type: str) -> None:
    sizes = [
        len(encode(image(256, 256), ImageConfig(type=image_type, quality=quality), {}))  # type: ignore[arg-type]
        for quality in (20, 60, 95)
    ]

    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2] / 2


def test_pixels_that_are_not_contiguous_are_encoded_in_order() -> None:
    pixels = image(64, 64)[::2, ::-1]

    with Image.open(io.BytesIO(encode(pixels, ImageConfig(), {}))) as opened:
        assert np.array_equal(np.asarray(opened), pixels)


@pytest.mark.parametrize("text", ["p", "猫", "🐈", '"', "&", "\n", "'\""])
def test_jpeg_cuts_the_longest_texts_and_keeps_the_rest(text: str) -> None:
    data = encoded("jpeg", text * 100_000, id="the id")

    found = read_provenance(data)
    assert (found["id"], found["key"], found["seed"]) == ("the id", "000010002", 2**53 - 1)
    assert (text * 100_000).startswith(found["prompt"])
    assert len(found["prompt"]) > 1000
    assert xmp_of(data).get(f"{IPTC}DigitalSourceType") == AI_SOURCE_TYPE


def test_png_and_webp_hold_texts_of_any_length() -> None:
    for image_type in ("png", "webp"):
        assert len(read_provenance(encoded(image_type, "ab" * 5_000))["prompt"]) == 10_000
    assert len(read_provenance(encoded("png", "ab" * 200_000))["prompt"]) == 400_000


@pytest.mark.parametrize("image_type", TYPES)
def test_an_image_of_another_program_has_no_provenance(image_type: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(image()).save(buffer, image_type)

    assert read_provenance(buffer.getvalue()) == {}


def test_every_type_has_its_suffix() -> None:
    assert dict(SUFFIXES) == {"png": "png", "jpeg": "jpg", "webp": "webp"}


def test_the_distance_of_two_images_is_in_levels() -> None:
    dark, light = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    one_off = dark.copy()
    one_off[0, 0, 0] = 12
    assert difference(dark, light) == (255, 255.0, 0.0)
    assert difference(one_off, dark) == difference(dark, one_off) == (12, 0.25, pytest.approx(43.36, abs=1e-2))
    assert difference(dark, dark) == (0, 0.0, None)
    assert difference(dark, dark[:2]) is None
    assert difference(decode(encoded("png")), image()) == (0, 0.0, None)
