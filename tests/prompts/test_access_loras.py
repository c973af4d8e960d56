"""The LoRAs of a row, and addresses that it may not name."""

from __future__ import annotations

import pytest

from flux_batch.config.schema import LoraConfig
from flux_batch.errors import RowError
from flux_batch.prompts.access import RowLoras
from flux_batch.records import LoraUse

STYLE = LoraConfig(uri="/loras/style.safetensors", scale=0.8, name="style")
DETAIL = LoraConfig(uri="s3://bucket/detail.safetensors")
FILE = "/data/prompts/part-1.parquet"


def choose(
    name: object, scale: float | None = None, *, file: str = FILE, of_job: tuple[LoraConfig, ...] = (STYLE, DETAIL)
):
    return RowLoras(of_job, file).choose(name, scale)


def test_a_row_that_says_nothing_has_those_of_the_job() -> None:
    assert choose(None) == (
        LoraUse(name="style", uri="/loras/style.safetensors", scale=0.8),
        LoraUse(name="s3://bucket/detail.safetensors", uri="s3://bucket/detail.safetensors", scale=1.0),
    )
    assert choose(None, of_job=()) == ()


@pytest.mark.parametrize("name", ["", "  ", "none"])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_a_row_can_say_none(name: str, scale: float | None) -> None:
    assert choose(name, scale) == ()


@pytest.mark.parametrize("name", ["style", "/loras/style.safetensors"])
def test_a_row_names_one_of_the_job_and_has_its_scale(name: str) -> None:
    (lora,) = choose(name)

    assert (lora.name, lora.uri, lora.scale) == ("style", "/loras/style.safetensors", 0.8)


def test_the_scale_of_a_row_goes_before_that_of_the_job() -> None:
    assert choose("style", -2.0)[0].scale == -2.0
    assert choose("style", 0.0)[0].scale == 0.0


@pytest.mark.parametrize(
    ("name", "file", "uri"),
    [
        ("/else/x.safetensors", FILE, "/else/x.safetensors"),
        ("loras/x.safetensors", FILE, "/data/prompts/loras/x.safetensors"),
        ("file:///else/x.safetensors", FILE, "file:///else/x.safetensors"),
        ("s3://bucket/x.safetensors", FILE, "s3://bucket/x.safetensors"),
        ("x.safetensors", "s3://bucket/p/1.jsonl", "s3://bucket/p/x.safetensors"),
        ("hf://owner/lora", FILE, "hf://owner/lora"),
    ],
)
def test_a_row_names_another_by_its_address(name: str, file: str, uri: str) -> None:
    assert choose(name, file=file) == (LoraUse(name=name, uri=uri, scale=1.0),)
    assert choose(name, 0.3, file=file)[0].scale == 0.3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "stile",
            "neither a LoRA of the job (which has style, s3://bucket/detail.safetensors) nor a .safetensors file",
        ),
        ("/loras/x.ckpt", "nor a .safetensors file"),
        ("https://example.com/x.safetensors", "only model.loras of the job may name such an address"),
        ("ftp://example.com/x.safetensors", "only model.loras"),
        ("s3://bucket/../x.safetensors", "only model.loras"),
        ("simplecache::s3://bucket/x.safetensors", "only model.loras"),
        ("s3://bucket/x::file:///etc/x.safetensors", "only model.loras"),
        (7, "column 'lora' holds int"),
        ("x" * 5000, "5000 characters"),
        ("a\0.safetensors", "not a path or an address"),
    ],
)
def test_what_a_row_may_not_name(name: object, words: str) -> None:
    with pytest.raises(RowError) as caught:
        choose(name)
    assert words in str(caught.value)


def test_a_web_address_that_the_job_names_may_be_named() -> None:
    web = LoraConfig(uri="https://example.com/x.safetensors", scale=0.5)

    assert choose("https://example.com/x.safetensors", of_job=(web,))[0].scale == 0.5


def test_a_scale_alone_is_that_of_the_only_lora() -> None:
    assert choose(None, 0.1, of_job=(STYLE,)) == (LoraUse(name="style", uri="/loras/style.safetensors", scale=0.1),)
    with pytest.raises(RowError, match="the job has 2 LoRAs, so the row must name one"):
        choose(None, 0.1)
    with pytest.raises(RowError, match="the job has no LoRAs"):
        choose(None, 0.1, of_job=())
