"""The job file: one frozen, validated tree; what to make apart from how to run.

Knows names, ranges and defaults; opens nothing but the text it is given.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from flux_batch.errors import InvalidSetting, JobError
from flux_batch.records import ALIASES, MAX_SEED, SAMPLING_FIELDS, SamplingParams

REDACTED = "(redacted)"
# The storage options that carry no secret; every other value is redacted wherever a config is written down.
PUBLIC_OPTIONS = frozenset(
    {"anon", "client_kwargs", "endpoint_url", "profile", "region_name", "requester_pays", "use_ssl"}
)
STORAGE_OPTIONS = {"prompts": {"storage_options"}, "output": {"storage_options"}}
# Columns of the data set that the job understands, by our own names.
PROMPT_FIELDS = ("prompt", "id", "seed", "num_images_per_prompt", *SAMPLING_FIELDS)


def _with_aliases(values: Any) -> Any:
    """Rename the diffusers spellings in a mapping to ours; both spellings at once are an error."""
    if not isinstance(values, Mapping):
        return values
    renamed: dict[str, Any] = {}
    for key, value in values.items():
        name = ALIASES.get(str(key), str(key))
        if name in renamed:
            raise InvalidSetting(f"{key}: {name} is given twice, under two spellings", field=key)
        renamed[name] = value
    return renamed


Uris = Annotated[tuple[str, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else v), Field(strict=False)]
Names = Annotated[tuple[str, ...], Field(strict=False)]
Columns = Annotated[dict[str, str], BeforeValidator(_with_aliases)]


class Section(BaseModel):
    """A part of the job file: frozen, exact types, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class PromptsConfig(Section):
    """Where the prompts are and which columns mean what."""

    uri: Uris
    """File, folder, glob or list of them; .parquet .jsonl .csv .txt; `demo` for the prompts in the package."""
    columns: Columns = {}
    """Our field: their column."""
    passthrough: Names = ()
    """Columns copied into the metadata."""
    limit: int | None = Field(default=None, ge=1)
    """Take only the first rows."""
    storage_options: dict[str, Any] = Field(default={}, repr=False)
    """fsspec options, e.g. `endpoint_url` for an S3-compatible store."""

    @field_validator("uri")
    @classmethod
    def _not_empty(cls, uris: tuple[str, ...]) -> tuple[str, ...]:
        if not uris or not all(uri.strip() for uri in uris):
            raise ValueError("must name at least one file, folder or glob")
        return uris

    @field_validator("passthrough")
    @classmethod
    def _named_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"names column {name!r} twice")
        return names

    @field_validator("columns")
    @classmethod
    def _known_fields(cls, columns: dict[str, str]) -> dict[str, str]:
        for name in columns:
            if name not in PROMPT_FIELDS:
                raise ValueError(f"{name!r} is not a field of a prompt{did_you_mean(name, PROMPT_FIELDS)}")
        return columns


class ImageConfig(Section):
    """How pictures are encoded."""

    type: Literal["png", "jpeg", "webp"] = "png"
    quality: int = Field(default=95, ge=1, le=100)
    """JPEG and WebP only; PNG is lossless."""


class OutputConfig(Section):
    """Where and in which layout the pictures go."""

    uri: str = Field(min_length=1)
    format: Literal["webdataset", "files", "parquet"] = "webdataset"
    image: ImageConfig = ImageConfig()
    shard_size: int = Field(default=256, ge=1, le=9999)
    """Prompts a shard: the unit of work, retry and commit."""
    storage_options: dict[str, Any] = Field(default={}, repr=False)


class ModelConfig(Section):
    """Which weights, in which arithmetic."""

    uri: str = Field(min_length=1)
    """A folder with a FLUX.1 repository, or `demo`."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    quantization: Literal["none"] = "none"
    compile: Literal[False] = False
    loras: Annotated[tuple[str, ...], Field(strict=False, max_length=0)] = ()

    @field_validator("quantization", "compile", "loras", mode="before")
    @classmethod
    def _not_yet(cls, value: Any, info: ValidationInfo) -> Any:
        if value and value != "none":
            raise ValueError("not available in this version; leave it out")
        return value


class SamplingConfig(Section):
    """Defaults of every prompt; a row may override each by a column of that name."""

    width: int = 1024
    height: int = 1024
    num_inference_steps: int = 28
    embedded_guidance: float = 3.5
    cfg_scale: float = 1.0
    negative_prompt: str = ""
    t5_sequence_length: int | None = None
    """Text tokens; the model's own number if null."""
    num_images_per_prompt: int = Field(default=1, ge=1, le=1000)
    seed: int = Field(default=0, ge=0, lt=MAX_SEED)
    """Seed of the run, from which images derive theirs when their row has none."""

    @model_validator(mode="before")
    @classmethod
    def _aliases(cls, values: Any) -> Any:
        return _with_aliases(values)

    @model_validator(mode="after")
    def _in_range(self) -> SamplingConfig:
        self.params()
        return self

    def params(self) -> SamplingParams:
        """Give the defaults as the record that the pipeline is called with."""
        return SamplingParams(**{name: getattr(self, name) for name in SAMPLING_FIELDS})


class WorkersConfig(Section):
    """How many workers, and what each one holds."""

    min: int = Field(default=1, ge=1)
    """The run counts as stuck, and says so, while fewer than these are up."""
    max: int = Field(default=8, ge=1)
    num_gpus: float = Field(default=1, ge=0)
    num_cpus: float = Field(default=1, ge=0)
    batch_size: int = Field(default=4, ge=1)
    """Images in one forward pass."""

    @model_validator(mode="after")
    def _ordered(self) -> WorkersConfig:
        if self.min > self.max:
            raise InvalidSetting(f"min = {self.min}: must not exceed max = {self.max}", field="min")
        return self


class FailuresConfig(Section):
    """How much may fail."""

    max_ratio: float = Field(default=0.01, ge=0, le=1)
    """Share of images that may fail before the finished run exits with 3."""
    max_attempts: int = Field(default=3, ge=1)
    """Attempts a shard, each on another worker if there is one."""


class JobConfig(Section):
    """A whole job. Raises: JobError that names each wrong key and what would be right."""

    name: str = Field(default="flux-batch", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    prompts: PromptsConfig
    output: OutputConfig
    model: ModelConfig
    sampling: SamplingConfig = SamplingConfig()
    workers: WorkersConfig = WorkersConfig()
    failures: FailuresConfig = FailuresConfig()

    @classmethod
    def from_yaml(cls, text: str, *, origin: str = "job file", overrides: Iterable[str] = ()) -> JobConfig:
        """Parse a job file; `overrides` are `section.key=value` strings whose values are YAML too."""
        tree = load_yaml(text, origin)
        if not isinstance(tree, dict):
            raise JobError(f"{origin}: must be a mapping with the sections prompts, output and model")
        for override in overrides:
            _apply_override(tree, override)
        return cls.from_dict(tree, origin=origin)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any], *, origin: str = "job") -> JobConfig:
        """Validate a tree of plain values."""
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise JobError("\n".join(f"{origin}: {line}" for line in _explain(error))) from error

    def to_yaml(self) -> str:
        """Write the whole tree with every default spelled out and every secret redacted."""
        tree = self.model_dump(mode="json", exclude=STORAGE_OPTIONS)
        tree["prompts"]["storage_options"] = _redact(self.prompts.storage_options)
        tree["output"]["storage_options"] = _redact(self.output.storage_options)
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)

    def identity(self) -> dict[str, Any]:
        """Name everything that changes pictures, keys or layout, by dotted key; a resumed run must agree on all of it.

        Where the prompts and the output lie, and how many workers run, is not part of it.
        """
        tree = self.model_dump(mode="json", exclude=STORAGE_OPTIONS)
        parts = {
            "prompts": {key: tree["prompts"][key] for key in ("columns", "passthrough", "limit")},
            "output": {key: tree["output"][key] for key in ("format", "shard_size")},
            "output.image": tree["output"]["image"],
            "model": {key: tree["model"][key] for key in ("uri", "dtype", "quantization", "loras")},
            "sampling": tree["sampling"],
        }
        return {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggest the nearest known name, or list them all: the tail of an error message."""
    known = list(known)
    near = difflib.get_close_matches(name, [*known, *ALIASES], n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


def load_yaml(text: str, origin: str) -> Any:
    """Parse YAML; messages quote no line of it, since that may hold a secret."""
    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise JobError(f"{origin}: {line}not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        # PyYAML lets through what Python says to `2026-13-01`, `!!int x` and the like.
        raise JobError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from error


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, separator, value = override.partition("=")
    if not separator or not path.strip():
        raise JobError(f"--set {path}: must be section.key=value")
    *sections, key = path.strip().split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise JobError(f"--set {path}: {section} is not a section")
    tree[key] = load_yaml(value, f"--set {path}")


def _explain(error: ValidationError) -> list[str]:
    """Turn pydantic's findings into one line each: dotted key, what was got, what would be right."""
    lines = []
    for finding in error.errors():
        path = ".".join(str(part) for part in finding["loc"])
        cause = finding.get("ctx", {}).get("error")
        if finding["type"] == "extra_forbidden":
            *sections, key = finding["loc"]
            lines.append(f"{path}: unknown key{did_you_mean(str(key), _keys_at(sections))}")
        elif finding["type"] == "missing":
            lines.append(f"{path}: missing, and it has no default")
        elif isinstance(cause, InvalidSetting):
            lines.append(f"{path}.{cause}" if path else str(cause))
        elif finding["type"] in ("model_type", "dict_type"):
            lines.append(f"{path}: must be a section with keys and values")
        else:
            reason = finding["msg"].removeprefix("Value error, ")
            reason = reason[0].lower() + reason[1:]
            lines.append(f"{path}{_shown(finding)}: {reason}")
    return lines


def _shown(finding: ErrorDetails) -> str:
    """Show the value that was wrong, unless it is, or holds, what may be a secret."""
    value = finding["input"]
    if "storage_options" in finding["loc"] or not isinstance(value, (str, int, float)):
        return ""
    text = repr(value)
    return f" = {text}" if len(text) <= 100 else f" = {text[:100]}..."


def _keys_at(sections: list[int | str]) -> list[str]:
    model: Any = JobConfig
    for section in sections:
        model = model.model_fields[section].annotation
    return list(model.model_fields)


def _redact(options: Mapping[str, Any]) -> dict[str, Any]:
    """Replace every value that may be a secret; addresses lose their user and password."""
    public: dict[str, Any] = {}
    for key, value in options.items():
        if key not in PUBLIC_OPTIONS:
            public[key] = REDACTED
        elif isinstance(value, Mapping):
            public[key] = _redact(value)
        elif isinstance(value, str):
            public[key] = re.sub("//[^/]*@", "//", value)
        else:
            public[key] = value
    return public
