"""The card of an export: a header for loaders and the Hub, then a page for people.

It has no date: the same run, selection and options give the same card.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from flux_batch.dataset.export.facts import (
    Histogram,
    RunFacts,
    annotators,
    histograms,
    run_facts,
    selection_facts,
)
from flux_batch.output.metadata import RECORD_SCHEMA, passthrough_name, sample_columns
from flux_batch.redaction import public_tree, public_uri

if TYPE_CHECKING:
    from flux_batch.dataset.export.export import Packer

# The Hub's size categories, each with its largest number of rows.
_SIZES = (
    *((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")),
    *((10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"), (1_000_000_000, "100M<n<1B")),
)
_BARS = " ▁▂▃▄▅▆▇█"
_MEANINGS = {
    "key": "the key of the image: shard and row of the run, `_1` and so on for further images of a row",
    "id": "the id of the prompt's row",
    "image_index": "which image of its row, from 0",
    "prompt": "the prompt",
    "negative_prompt": "what the image must not show; read if `cfg_scale` is not 1",
    "seed": "the seed of the image",
    "width": "pixels, as made",
    "height": "pixels, as made",
    "num_inference_steps": "denoising steps",
    "embedded_guidance": "the guidance given to the model (diffusers' `guidance_scale`)",
    "cfg_scale": "the scale of true classifier-free guidance (diffusers' `true_cfg_scale`)",
    "t5_sequence_length": "T5 tokens (diffusers' `max_sequence_length`)",
    "sigma_shift": "the shift of a static schedule; null for the model's own",
    "denoising_strength": "the share of noise over the input image (diffusers' `strength`)",
    "input_image": "the name of the input image",
    "mask_image": "the name of its mask, white where it was repainted",
    "control_image": "the name of the control image, or the names of several",
    "reference_image": "the name of the reference image, or the names of several",
    "image_prompt": "the name of the image prompt, or the names of several",
    "control_image_scale": "the weight of each control image",
    "image_prompt_scale": "the weight of each image prompt",
    "lora": "the LoRA, or all of them with their scales",
    "lora_scale": "the scale of a single LoRA",
    "tile_size": "the tiles of the autoencoder; null unless it worked in tiles",
    "clip_truncated": "whether CLIP's tokenizer cut the prompt",
    "t5_truncated": "whether T5's tokenizer did",
    "model": "the model",
    "quantization": "how its matrices were stored",
    "step_cache": "the threshold for reusing steps; 0 is off",
    "sha256": "of the bytes of the image",
    "bytes": "the size of the image",
    "image": "the image",
    "source_sha256": "of the bytes of the source images, which the image was made from",
    "stored_width": "pixels, as stored here",
    "stored_height": "pixels, as stored here",
}

_OF_QUALITY = {
    "tries": "how many images were made for it",
    "score": "the score of the one that is kept",
    "accepted": "whether it reaches the score that was asked for",
}


def export_card(
    packer: Packer, *, address: str, shard_size: int, licence: str | None = None, samples: str | None = None
) -> str:
    """Return the card of an export.

    address: the destination, as loaders need it. licence: the Hub's id of the licence that the user has given. samples:
    the name of an image with samples beside the card.
    """
    source = packer.source
    config = source.run.config
    facts = run_facts(source)
    images = _counted(source.chosen.num_rows, "synthetic image")
    parts = [
        f"# {config.name}",
        f"{images}, made by a model from text with flux-batch. Every image "
        "is labelled as AI generated: its metadata has IPTC's `trainedAlgorithmicMedia`, its prompt and its settings.",
    ]
    if samples:
        parts.append(f"![{samples}]({samples})")
    parts += ["## Images", _table(("split", "images"), [(name, f"{num:,}") for name, num in source.splits.items()])]
    parts += list(_chosen(source.selection, selection_facts(source), facts))
    parts += ["## How it was made", _table(("", ""), _settings(packer, facts))]
    parts += list(_recipe(config.prompts))
    parts += ["## Columns", _table(("column", "type", "meaning"), list(_columns(packer)))]
    if scores := histograms(source):
        parts += [
            "## Scores",
            _table(("column", "values", "5 %", "median", "95 %", "from ... to", ""), _scores(scores)),
        ]
    parts += ["## Load it", *_loaders(packer, address, shard_size)]
    parts += ["## Licence", _licence(licence)]
    return _header(packer, licence) + "\n".join(f"{part}\n" for part in parts)


def _header(packer: Packer, licence: str | None) -> str:
    source = packer.source
    files = [{"split": split, "path": packer.loader_pattern(split)} for split in source.splits]
    header: dict[str, Any] = {
        **({"license": licence} if licence else {}),
        "pretty_name": source.run.config.name,
        "task_categories": ["text-to-image"],
        "size_categories": [next((word for most, word in _SIZES if source.chosen.num_rows < most), "n>1T")],
        "tags": ["synthetic", "text-to-image", "flux", "flux-batch"],
        "configs": [{"config_name": "default", "data_files": files}],
    }
    lines = "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in header.items())
    return f"---\n{lines}---\n\n"


def _chosen(name: str | None, made_by: Mapping[str, Any], facts: RunFacts) -> Iterator[str]:
    """Yield the paragraphs about the selection of images and about failures."""
    made = facts.num_images - facts.num_failed
    end = ":" if facts.failures else "."
    asked = _counted(facts.num_images, "image")
    yield f"The run asked for {asked} and made {made:,} of them; {facts.num_failed:,} failed{end}"
    if facts.failures:
        yield _table(("reason", "failed"), [(f"`{why}`", f"{number:,}") for why, number in facts.failures.items()])
    if name is None:
        yield "All that were made are here."
        return
    criteria = {key: value for key, value in made_by.get("criteria", {}).items() if value is not None}
    yield f"Chosen by the selection `{name}`:"
    yield f"```json\n{json.dumps(criteria, indent=1, ensure_ascii=False)}\n```"
    left_out = made_by.get("left_out", {})
    if left_out:
        yield _table(("left out", "images"), [(why, f"{number:,}") for why, number in left_out.items()])


def _settings(packer: Packer, facts: RunFacts) -> list[tuple[str, str]]:
    config = packer.source.run.config
    sampling = config.sampling
    model = facts.model
    rows = [
        ("model", f"{public_uri(config.model.uri)} ({model.get('dtype', config.model.dtype)})"),
        ("revision of its files", str(model.get("revision") or "not known")),
        ("LoRAs", ", ".join(public_uri(lora.uri) for lora in config.model.loras) or "none"),
        ("size", f"{sampling.width} x {sampling.height}"),
        ("steps", str(sampling.num_inference_steps)),
        ("embedded guidance", sampling.guidance_text),
        ("true CFG scale", f"{sampling.cfg_scale:g}"),
        ("hours of GPUs", "not known" if facts.gpu_hours is None else f"{facts.gpu_hours:.2f}"),
        ("versions", ", ".join(f"{name} {number}" for name, number in facts.versions.items()) or "not known"),
    ]
    if packer.source.max_side is not None:
        rows.append(("stored", f"shrunk to at most {packer.source.max_side} pixels a side"))
    if packer.source.finish is not None:
        rows.append(("finished by", f"`{packer.source.finish}`"))
    for name, annotator in annotators(packer.source).items():
        rows.append((f"annotation `{name}`", _said(annotator)))
    return [*rows, ("each row", "may have settings of its own: they are columns")]


def _said(annotator: Mapping[str, Any]) -> str:
    """Return the annotator of an annotation, in one line."""
    said = {key: value for key, value in annotator.items() if key not in ("columns", "name") and value}
    return (
        ", ".join(f"{key} {json.dumps(public_tree(value), ensure_ascii=False)}" for key, value in said.items()) or "-"
    )


def _recipe(prompts: Any) -> Iterator[str]:
    """Yield the samplers and the template of the prompts; nothing if they come from files alone."""
    if prompts.samplers or prompts.template is not None:
        made = {"template": prompts.template, "samplers": prompts.samplers, "design": prompts.design}
        yield "The prompts are made by a recipe:"
        yield f"```json\n{json.dumps(public_tree(made), indent=1, ensure_ascii=False)}\n```"


def _columns(packer: Packer) -> Iterator[tuple[str, str, str]]:
    """Yield name, type and meaning of each column."""
    source = packer.source
    names = {column.name: column for column in source.annotation_columns}
    renamed = {passthrough_name(field.name): field.name for field in source.columns}
    if packer.format != "webdataset":
        yield ("`image`", "image", _MEANINGS["image"])
        for name in packer.output_format.sources:
            yield (f"`{name}`", "image", "an image that it was made from, as the model read it, without a label")
    meanings = _MEANINGS | (_OF_QUALITY if source.run.config.quality else {})
    for field in sample_columns(source.columns):
        own = renamed.get(field.name, field.name)
        if own in names and own not in RECORD_SCHEMA.names:
            column = names[own]
            meaning = f"`{column.column}` of the annotation `{column.annotation}`"
        else:
            meaning = meanings.get(field.name, "a column of the prompts")
        yield (f"`{field.name}`", _type(field.type), meaning)


def _type(kind: pa.DataType) -> str:
    return str(kind).replace("list<item: ", "list<").replace("list<element: ", "list<")


def _scores(scores: Sequence[Histogram]) -> list[tuple[str, ...]]:
    return [
        (
            f"`{score.column}`",
            f"{score.num_values:,}",
            *(f"{value:.4g}" for value in score.quantiles),
            f"{score.low:.4g} ... {score.high:.4g}",
            f"`{_bars(score.counts)}`",
        )
        for score in scores
    ]


def _bars(counts: Sequence[int]) -> str:
    most = max(counts)
    return "".join(_BARS[-(-count * (len(_BARS) - 1) // most)] for count in counts)


def _loaders(packer: Packer, address: str, shard_size: int) -> Iterator[str]:
    """Yield the ways to load the data set."""
    split = next(iter(packer.source.splits))
    name = address.removeprefix("hf://datasets/")
    pieces = [piece.name for piece in packer.source.pieces(shard_size) if piece.split == split]
    shards = f"{{{pieces[0]}..{pieces[-1]}}}" if len(pieces) > 1 else pieces[0]
    is_hub = name != address
    web = f"https://huggingface.co/datasets/{name}/resolve/main/{split}" if is_hub else f"{address}/{split}"
    yield _python(f'from datasets import load_dataset\n\nimages = load_dataset("{name}", split="{split}")')
    streamed = f'load_dataset("{name}", split="{split}", streaming=True)'
    yield _python(f"from datasets import load_dataset\n\nfor row in {streamed}:\n    ...")
    if packer.format == "lance":
        lance = f'import lance\n\nimages = lance.dataset("{address}/{split}.lance")\n'
        yield _python(f'{lance}rows = images.to_table(columns=["prompt", "seed"], limit=5)')
        yield _python(f'{lance}some = images.take([0], columns=["image", "prompt"])')
    elif packer.format == "webdataset":
        suffix = packer.output_format.suffix
        members = [f"{name}.{suffix}" for name in packer.output_format.sources] + [suffix, "txt", "json"]
        yield _python(
            f'import webdataset\n\nimages = webdataset.WebDataset("{web}/{shards}.tar", shardshuffle=False)'
            f'.decode("pil").to_tuple({", ".join(json.dumps(name) for name in members)})'
        )
        yield _python(
            f'import io, json, tarfile\n\nimport fsspec\n\nwith fsspec.open("{web}/{pieces[0]}.tar") as file:\n'
            '    for member in tarfile.open(fileobj=file, mode="r|"):\n        ...'
        )
    else:
        table = f"{address}/{packer.loader_pattern(split)}"
        table = table if packer.format == "parquet" else f"{address}/{split}/*/metadata.parquet"
        yield _python(f"import duckdb\n\nduckdb.sql(\"SELECT prompt, seed FROM '{table}' LIMIT 5\")")
        first = f"{split}/{pieces[0]}{'.parquet' if packer.format == 'parquet' else '/metadata.parquet'}"
        yield _python(f'import pandas\n\nrows = pandas.read_parquet("{address}/{first}")')


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _python(text: str) -> str:
    return f"```python\n{text}\n```"


def _licence(licence: str | None) -> str:
    said = f"`{licence}`, as said by who published it." if licence else "None was stated when this was written."
    return (
        f"{said} A model has a licence of its own, which may reach what it makes: FLUX.1-dev's does; FLUX.1-schnell is "
        "under Apache-2.0."
    )


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )
