"""The data set card: the README.md of an output, which makes `datasets.load_dataset(output)` work from the start."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flux_batch.config.schema import JobConfig
from flux_batch.errors import count_of
from flux_batch.output.formats import format_for
from flux_batch.output.paths import METADATA, SUCCESS, TRAIN
from flux_batch.redaction import public_tree, public_uri


def card(config: JobConfig, num_prompts: int, sampled: Mapping[str, str] | None = None) -> str:
    """Return the card: a header for loaders, then a page for people. It has no date: the same job gives the same bytes.

    sampled: the shares of each sampler's values, as text.
    """
    pattern = format_for(config.output).loader_pattern
    header = {
        "configs": [{"config_name": "default", "data_files": [{"split": TRAIN, "path": pattern}]}],
        "tags": ["synthetic", "text-to-image", "flux"],
    }
    sampling = config.sampling
    return f"""---
{_yaml(header)}---

# {config.name}

Synthetic images, made by a model from text: {count_of(num_prompts, "prompt")}, \
{count_of(sampling.num_images_per_prompt, "image")} each unless a row asked for more.
Made with flux-batch. `datasets.load_dataset` reads this folder as it is.

| setting | value |
|---|---|
| model | {public_uri(config.model.uri)} ({config.model.dtype}) |
| size | {sampling.width} x {sampling.height} |
| steps | {sampling.num_inference_steps} |
| embedded guidance | {sampling.guidance_text} |
| true CFG scale | {sampling.cfg_scale} |
{_quality(config)}{_sources(config)}
A prompt row may override each of these; `{METADATA}/*.parquet` has what was used, one row for every
requested image, failed ones included. Every image carries its own settings inside and is labelled as AI generated.
The run is complete when `{SUCCESS}` is there.{_licence(config)}
{_recipe(config)}{_shares(sampled or {})}"""


def _licence(config: JobConfig) -> str:
    """Return a note on the licence of the weights; empty for those in the package."""
    if config.model.uri == "demo":
        return ""
    return " FLUX.1-dev weights have a licence of their own, which reaches the use of\nwhat they make."


def _quality(config: JobConfig) -> str:
    """Return the row with the rule by which images were kept; empty if all were kept."""
    quality = config.quality
    if quality is None:
        return ""
    kept = f"{quality.score} of at least {quality.at_least:g}, in at most {quality.max_tries} tries"
    return f"| quality | {kept}; otherwise: {quality.otherwise} |\n"


def _sources(config: JobConfig) -> str:
    """Return the row about source images; empty if none are written."""
    names = ", ".join(f"`{name}`" for name in config.output.source_names)
    return (
        f"| images before the edit | {names} beside each image, as the model read them, not labelled |\n"
        if names
        else ""
    )


def _recipe(config: JobConfig) -> str:
    """Return the recipe of the prompts as a paragraph; empty if they come from files alone."""
    prompts = config.prompts
    if not prompts.samplers and prompts.template is None and not prompts.wildcards:
        return ""
    made: dict[str, Any] = {"template": prompts.template, "samplers": prompts.samplers, "design": prompts.design}
    if prompts.wildcards:
        made["wildcards"] = prompts.wildcards
    text = json.dumps(public_tree(made), indent=1, ensure_ascii=False)
    return f"\nThe prompts are made by a recipe:\n\n```json\n{text}\n```\n"


def _shares(sampled: Mapping[str, str]) -> str:
    """Return the table of sampled values; empty without samplers."""
    rows = [f"| {_cell(name)} | {_cell(shares)} |\n" for name, shares in sampled.items()]
    return f"\n| sampler | shares of its values |\n|---|---|\n{''.join(rows)}" if rows else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _yaml(header: dict[str, object]) -> str:
    """Return the header as YAML. Its values are written as JSON, which is valid YAML and needs no further library."""
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in header.items())
