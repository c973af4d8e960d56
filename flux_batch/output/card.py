"""The data set card: the README.md of an output, so that `datasets.load_dataset(output)` works from the start."""

from __future__ import annotations

import json

from flux_batch.config.schema import JobConfig
from flux_batch.output.formats import format_for
from flux_batch.output.paths import METADATA, SUCCESS, TRAIN
from flux_batch.redaction import public_tree, public_uri


def card(config: JobConfig, num_prompts: int) -> str:
    """Return the card: a header for loaders, then a page for people. Without a date: the same job, the same bytes."""
    pattern = format_for(config.output).loader_pattern
    header = {
        "configs": [{"config_name": "default", "data_files": [{"split": TRAIN, "path": pattern}]}],
        "tags": ["synthetic", "text-to-image", "flux"],
    }
    sampling = config.sampling
    return f"""---
{_yaml(header)}---

# {config.name}

Synthetic images, made by a model from text: {num_prompts} prompts, {sampling.num_images_per_prompt} image(s) each
unless a row asked for more. Made with flux-batch.

| setting | value |
|---|---|
| model | {public_uri(config.model.uri)} ({config.model.dtype}) |
| size | {sampling.width} x {sampling.height} |
| steps | {sampling.num_inference_steps} |
| embedded guidance | {sampling.embedded_guidance} |
| true CFG scale | {sampling.cfg_scale} |

{_recipe(config)}A prompt row may override each of these; `{METADATA}/*.parquet` has what was used, one row for every
requested image, failed ones included. Every image carries its own settings inside and is labelled as AI generated.
The run is complete when `{SUCCESS}` is there. FLUX.1-dev weights have a licence of their own, which reaches the use of
what they make.
"""


def _recipe(config: JobConfig) -> str:
    """Return the samplers and the template of the prompts as a paragraph; empty if they come from files alone."""
    prompts = config.prompts
    if not prompts.samplers and prompts.template is None:
        return ""
    made = {"template": prompts.template, "samplers": prompts.samplers, "design": prompts.design}
    text = json.dumps(public_tree(made), indent=1, ensure_ascii=False)
    return f"The prompts are made by a recipe:\n\n```json\n{text}\n```\n\n"


def _yaml(header: dict[str, object]) -> str:
    """Return the header as YAML; JSON values are YAML too, and need no second library here."""
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in header.items())
