"""A draft of a job file for given prompts."""

from __future__ import annotations

import json
import posixpath
import re

from flux_batch.config.schema import PROMPT_FIELDS, JobConfig, PromptsConfig
from flux_batch.config.text import load_yaml
from flux_batch.errors import JobError
from flux_batch.prompts.source import PROMPT_NAMES, PromptSource, near_field
from flux_batch.redaction import public_uri
from flux_batch.sampling_params import ALIASES

# The number of first rows that tell the columns of a file without a header.
_ROWS_READ = 10_000
# Names of columns in public data sets, the likeliest first.
_NAMES = {
    "prompt": PROMPT_NAMES,
    "id": ("id", "uid", "uuid", "key", "image_id", "prompt_id", "__key__"),
}


def draft_job(uri: str, prompts: PromptsConfig) -> str:
    """Return a job file with comments for prompts; it contains `uri` as their address.

    Raises: JobError if no column looks like prompts.
    """
    columns = _columns_of(PromptSource(prompts))
    known = {field: found for field in PROMPT_FIELDS if (found := _first(columns, _NAMES.get(field, (field,))))}
    if not columns:
        raise JobError(f"{uri}: no row of it can be read; use e.g. a CSV file with the header `prompt`")
    if "prompt" not in known:
        raise JobError(f"{uri}: no column looks like prompts; it has {', '.join(columns)}; rename one to `prompt`")
    known = _with_near_names(known, columns)
    mapped = {field: column for field, column in known.items() if field != column}
    others = [each for each in columns if each not in (*known.values(), *ALIASES)]
    stem = posixpath.basename(public_uri(uri).rstrip("/")).split(".")[0]
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-_")[:100] or "images"
    text = _TEMPLATE.format(
        name=_quoted(name),
        uri=_quoted(uri),
        columns=_flow(mapped) if mapped else "{}",
        passthrough=f"[{', '.join(_quoted(each) for each in others)}]",
        output=_quoted(f"out/{name}"),
    )
    JobConfig.from_yaml(text, "the drafted job")
    return text


def _with_near_names(known: dict[str, str], columns: list[str]) -> dict[str, str]:
    """Return the column of each field, also under names of other programs, e.g. `steps`."""
    found = {ALIASES[column]: column for column in columns if column in ALIASES}  # rows are read by aliases anyway
    for column in columns:
        field = near_field(column)
        # A column `n` may number the rows: as num_images_per_prompt it would multiply the images.
        if field and field != "num_images_per_prompt" and column not in known.values():
            found.setdefault(ALIASES.get(field, field), column)
    return {**{field: column for field, column in found.items() if column not in ALIASES}, **known}


def _columns_of(source: PromptSource) -> list[str]:
    """Return the columns of the first file of prompts that has any."""
    schemas = (source.schema(file, _ROWS_READ) for file in source.files())
    return list(dict.fromkeys(next((schema.names for schema in schemas if schema.names), [])))


def _first(columns: list[str], names: tuple[str, ...]) -> str:
    """Return the column with the first of `names`, ignoring case; empty if there is none."""
    by_name = {column.strip().lower(): column for column in reversed(columns)}
    return next((by_name[name] for name in names if name in by_name), "")


def _quoted(text: str) -> str:
    """Return a text as YAML: plain if that is safe, else quoted as in JSON."""
    is_plain = re.fullmatch(r"[A-Za-z_/][\w./:-]*", text) and load_yaml(text, "") == text
    return text if is_plain else json.dumps(text, ensure_ascii=not text.isprintable())


def _flow(columns: dict[str, str]) -> str:
    return "{" + ", ".join(f"{field}: {_quoted(column)}" for field, column in columns.items()) + "}"


_TEMPLATE = """\
# Every key, its default and its meaning: the page of job files, jobs/README.md.
name: {name}

prompts:
  uri: {uri}
  columns: {columns}  # our field: your column
  passthrough: {passthrough}  # columns to copy into the metadata

output:
  uri: {output}  # a folder of its own for each run, or a bucket: s3://bucket/runs/...
  format: webdataset  # or files, parquet
  image: {{type: png}}  # or jpeg, webp

model:
  uri: demo  # the small model in the package; for real images e.g. /models/FLUX.1-dev

sampling:  # a column of the same name overrides each of these for its row
  width: 128  # 1024 for FLUX.1-dev
  height: 128
  num_inference_steps: 20

workers:
  max: 1
  num_gpus: 0  # 1 on a machine with GPUs
"""
