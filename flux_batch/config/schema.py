"""The job file as one frozen, validated tree; what to make is separate from how to run.

This module knows names, ranges and defaults, and opens no file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from flux_batch.config.conditions import ControlNetConfig, IPAdapterConfig, ReduxConfig
from flux_batch.config.factory import FACTORY
from flux_batch.config.running import FailuresConfig, QualityConfig, WorkersConfig
from flux_batch.config.section import Section, check_no_secret
from flux_batch.config.text import explain, nearest_or_all, overridden, read_tree, to_yaml
from flux_batch.config.values import PromptUris, Seed, Template, Wildcards
from flux_batch.errors import InvalidSetting, JobError
from flux_batch.records import IMAGE_COLUMNS, NO_LORA, WEIGHTED_COLUMNS
from flux_batch.redaction import public_tree, public_uri, redact
from flux_batch.sampling_params import (
    ALIASES,
    MAX_SEED,
    SAMPLING_FIELDS,
    Quantization,
    SamplingParams,
    check_cuda_graphs,
    check_quantization,
    check_step_cache,
    check_tiles,
)

# Keys of `model` that change pixels. `compile` does, because fused kernels round differently.
_MODEL_IDENTITY = (
    *("uri", "pipeline", "pipeline_options", "variant", "dtype", "quantization", "step_cache", "compile"),
    *("loras", "controlnets", "redux", "ip_adapter"),
)
_QUALITY_IDENTITY = ("score", "at_least", "max_tries", "keep", "otherwise", "options")
# The columns that `quality` adds to the metadata.
QUALITY_COLUMNS = ("tries", "score", "accepted")
# The column that `output.sources` adds to the metadata.
SOURCE_COLUMNS = ("source_sha256",)
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
_NO_PROMPTS = "must name at least one file, folder or glob"
_PROMPTS_IDENTITY = (
    *("columns", "passthrough", "rows", "samplers", "template", "wildcards", "design", "limit", "allow_http"),
)
_STORAGE_OPTIONS = {section: {"storage_options"} for section in ("prompts", "output", "model")}
# The columns of a data set that a job understands, with our names.
PROMPT_FIELDS = (
    *("prompt", "id", "seed", "num_images_per_prompt", "lora", "lora_scale"),
    *(*IMAGE_COLUMNS, *(f"{name}_scale" for name in WEIGHTED_COLUMNS), *SAMPLING_FIELDS),
)


def _with_aliases(values: Any) -> Any:
    """Return a mapping with diffusers' spellings renamed to ours. Raises: InvalidSetting if both are given."""
    if not isinstance(values, Mapping):
        return values
    renamed: dict[str, Any] = {}
    for key, value in values.items():
        name = ALIASES.get(str(key), str(key))
        if name in renamed:
            raise InvalidSetting(f"{key}: {name} is given twice, under two spellings", field=key)
        renamed[name] = value
    return renamed


_Names = Annotated[tuple[str, ...], Field(strict=False)]
_Columns = Annotated[dict[str, str], BeforeValidator(_with_aliases)]


class PromptsConfig(Section):
    """The prompts: their files, and the meaning of their columns."""

    uri: PromptUris = ()
    """A file, folder, glob or list of them, in any format listed on the page of job files; or `demo`, the packaged
    prompts."""
    columns: _Columns = Field(default={})
    """Our field: your column, e.g. `{prompt: caption, id: uid}`."""
    passthrough: _Names = ()
    """Columns to copy into the metadata."""
    rows: int | None = Field(default=None, ge=1)
    """The number of rows to make from `samplers` and `template`, without files; instead of `uri`."""
    samplers: dict[str, Any] = Field(default={})
    """Columns to draw for each row, e.g. `{animal: [cat, dog]}`; they are copied into the metadata."""
    template: Template = None
    """The prompt of each row, made from its columns: `A {{ animal }}`; or a mapping with templates for several fields
    of a row: `{prompt: "A {{ animal }}", width: "{{ 2 * height }}"}`."""
    wildcards: Wildcards = False
    """Draw choices such as `{red|blue}` in prompts. A folder of text files adds wildcards: `__animal__` is replaced by
    a line of `animal.txt`."""
    design: Literal["random", "grid", "balanced"] = "random"
    """The way to draw `rows`: `random` draws each row by itself, `grid` makes all combinations in turn, `balanced`
    draws values as close to the shares of their weights as possible."""
    limit: int | None = Field(default=None, ge=1)
    """Use only this many rows, from the start; all if null."""
    allow_http: bool = False
    """Allow rows to name images on the public web."""
    input_image_root: str | None = Field(default=None, min_length=1)
    """A folder or bucket prefix: rows may name images in it by their full path or address, besides images next to the
    prompts."""
    storage_options: dict[str, Any] = Field(default={}, repr=False)
    """Options of fsspec for the prompts, e.g. `endpoint_url` for an S3-compatible store."""

    @field_validator("uri")
    @classmethod
    def _not_empty(cls, uris: tuple[str, ...]) -> tuple[str, ...]:
        if not all(uri.strip() for uri in uris):
            raise ValueError(_NO_PROMPTS)
        return uris

    @property
    def metadata_columns(self) -> tuple[str, ...]:
        """The names of the columns that are copied into the metadata."""
        return (*self.passthrough, *(name for name in self.samplers if name not in self.passthrough))

    @property
    def templates(self) -> Mapping[str, str]:
        """The templates, by the field that each makes."""
        if isinstance(self.template, str):
            return {"prompt": self.template}
        return self.template or {}

    @model_validator(mode="after")
    def _known_templates(self) -> PromptsConfig:
        for name in self.templates:
            column = self.columns.get(name, name)
            if name not in PROMPT_FIELDS:
                hint = nearest_or_all(name, PROMPT_FIELDS)
                raise InvalidSetting(f"template: {name!r} is not a field of a prompt{hint}", field="template")
            if name != "prompt" and column in self.metadata_columns:
                raise InvalidSetting(
                    f"template: column {column!r} of {name} already comes from samplers or passthrough; leave one of "
                    "them out, or rename the sampler",
                    field="template",
                )
        return self

    @model_validator(mode="after")
    def _one_source(self) -> PromptsConfig:
        if not self.uri and self.rows is None:
            reason = _NO_PROMPTS if "uri" in self.model_fields_set else "missing, and it has no default"
            raise InvalidSetting(f"uri: {reason}; or set rows, samplers and template", field="uri")
        if self.uri and self.rows is not None:
            raise InvalidSetting("rows: prompts come from uri; leave one of the two out", field="rows")
        if self.rows is None and self.design != "random":
            raise InvalidSetting(f"design = {self.design}: is for rows without files; set rows", field="design")
        return self

    @model_validator(mode="after")
    def _no_secret(self) -> PromptsConfig:
        for uri in self.uri:
            check_no_secret(uri, "uri", "prompts")
        check_no_secret(self.input_image_root or "", "input_image_root", "prompts")
        check_no_secret(str(self.wildcards), "wildcards", "prompts")
        return self

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
                raise ValueError(f"{name!r} is not a field of a prompt{nearest_or_all(name, PROMPT_FIELDS)}")
        return columns


def source_name(number: int) -> str:
    """Return the name of an image's source image: source, source_1 and so on."""
    return f"source_{number}" if number else "source"


class ImageConfig(Section):
    """The encoding of images."""

    type: Annotated[Literal["png", "jpeg", "webp"], BeforeValidator(lambda v: "jpeg" if v == "jpg" else v)] = "png"
    """The file format of each image."""
    quality: int = Field(default=95, ge=1, le=100)
    """Quality of JPEG and WebP; PNG is lossless."""


class OutputConfig(Section):
    """The output: its folder, its format, its encoding."""

    uri: str = Field(min_length=1)
    """The bucket prefix of this run, or its folder on a disk that all nodes of a cluster share."""
    format: Literal["webdataset", "files", "parquet"] = "webdataset"
    """The layout of the data set: tars, folders of images, or Parquet."""
    image: ImageConfig = ImageConfig()
    shard_size: int = Field(default=256, ge=1, le=9999)
    """Prompts in a shard, which is the unit of work, retry and commit."""
    sources: int = Field(default=0, ge=0, le=16)
    """The number of source images to write beside each image, as training pairs for editing: the reference images of
    the row, or its input image, as the model reads them. A row with another number of them fails."""
    storage_options: dict[str, Any] = Field(default={}, repr=False)
    """Options of fsspec for the output."""

    @property
    def source_names(self) -> tuple[str, ...]:
        """The names of an image's source images."""
        return tuple(map(source_name, range(self.sources)))

    @model_validator(mode="after")
    def _no_secret(self) -> OutputConfig:
        check_no_secret(self.uri, "uri", "output")
        return self


class LoraConfig(Section):
    """A LoRA to merge into the weights."""

    uri: str = Field(min_length=1)
    """A safetensors file: a path, or an address like that of a model."""
    scale: float = 1.0
    """Strength of the LoRA; 0 turns it off."""
    name: str = ""
    """The name that rows use in their `lora` column; the uri without its query if left out."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("name") is None:
            return {**values, "name": public_uri(str(values.get("uri", "")))}
        return values

    @model_validator(mode="after")
    def _in_range(self) -> LoraConfig:
        check_no_secret(self.uri, "uri", "model")
        if self.name.strip() in NO_LORA:
            raise InvalidSetting(f"name = {self.name!r}: means no LoRA in a row; choose another", field="name")
        return self


class ModelConfig(Section):
    """The model: its weights, and how it computes."""

    uri: str = Field(min_length=1)
    """A FLUX.1 model: a folder, a file, an address of fsspec, a repository of Hugging Face, or `demo`."""
    storage_options: dict[str, Any] = Field(default={}, repr=False)
    """Options of fsspec for the model and the other weights of this section; options of a bucket do not apply to web
    addresses."""
    refresh: bool = False
    """Before a node's copy of the model or the other weights is used, ask the remote whether they have changed."""
    pipeline: str | None = Field(default=None, pattern=FACTORY.pattern)
    """`module:factory` of a pipeline that makes the images with another model; FLUX.1 if null."""
    pipeline_options: dict[str, Any] = Field(default={})
    """Options of that factory."""
    variant: Literal["auto", "dev", "schnell", "krea", "kontext", "fill", "canny", "depth"] = "auto"
    """The variant of FLUX.1, needed if neither the weights nor the names of their file and folder tell it."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """`auto` is the dtype that the device computes natively: the run's first worker records it, and all others use
    it."""
    quantization: Quantization = "none"
    """`fp8` halves the memory of bfloat16 weights; `fp8_matmul` also multiplies in fp8, on Ada, Hopper or later GPUs;
    `bfloat16` halves the memory of float32 weights, and dtype `auto` chooses it on a CPU with too little memory."""
    step_cache: float = 0.0
    """Reuse the last computed step for a step that differs from it by less than this share, up to 1; 0 is off."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the model's blocks with torch.compile: faster images after a slower start. `auto` does so on a GPU."""
    cuda_graphs: bool = False
    """Run each step of the transformer as one CUDA graph: faster for small images; not with `step_cache`."""
    offload_text_encoders: bool = False
    """Keep the text encoders in host memory while no texts are encoded; the images stay the same."""
    loras: Annotated[tuple[LoraConfig, ...], Field(strict=False)] = ()
    """LoRAs for every row that names none; the effects of several add up."""
    controlnets: Annotated[tuple[ControlNetConfig, ...], Field(strict=False)] = ()
    """ControlNets, whose residuals add up; each reads one image of a row's `control_image`, in this order."""
    redux: ReduxConfig | None = None
    """FLUX.1-Redux, which turns the `image_prompt` of a row into tokens after its text tokens."""
    ip_adapter: IPAdapterConfig | None = None
    """One or several IP-Adapters of XLabs, which let the image attend to the `image_prompt` of a row."""

    @field_validator("pipeline", mode="before")
    @classmethod
    def _names_a_factory(cls, text: Any) -> Any:
        if isinstance(text, str) and not FACTORY.fullmatch(text):
            raise ValueError("must be module:factory, as in jobs.diffusers_pipeline:DiffusersPipeline")
        return text

    @field_validator("quantization", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if value not in get_args(Quantization):
            raise ValueError(f"is not a known quantization{nearest_or_all(str(value), get_args(Quantization))}")
        return value

    @field_validator("compile", mode="before")
    @classmethod
    def _auto_or_not(cls, value: Any) -> Any:
        if value != "auto" and not isinstance(value, bool):
            raise ValueError("must be auto, true or false")
        return value

    @model_validator(mode="after")
    def _in_range(self) -> ModelConfig:
        check_quantization(self.quantization, self.dtype)
        check_step_cache(self.step_cache)
        check_cuda_graphs(
            self.cuda_graphs, self.step_cache, len(self.controlnets), has_ip_adapter=self.ip_adapter is not None
        )
        if self.redux and self.ip_adapter:
            raise InvalidSetting(
                "ip_adapter: redux reads the image prompts of rows, too; leave one of the two out", field="ip_adapter"
            )
        check_no_secret(self.uri, "uri", "model")
        if self.pipeline_options and self.pipeline is None:
            raise InvalidSetting("pipeline_options: need pipeline, which is not set", field="pipeline_options")
        for lora in self.loras:
            if sum(lora.name == other.name for other in self.loras) > 1:
                raise InvalidSetting(f"loras name {lora.name!r} twice: give each a name of its own", field="loras")
        return self


class SamplingConfig(Section, SamplingParams, frozen=True):
    """Defaults of every prompt; a row may override most of them by a column of the same name."""

    embedded_guidance: float | None = None  # type: ignore[assignment]
    """The guidance that the model was distilled with, at least 0; the model's own if null: 3.5; 30 for Fill and Canny,
    10 for Depth, 2.5 for Kontext, 4.5 for Krea."""
    input_image: str | None = Field(default=None, min_length=1)
    """The image to start from: a path or an address."""
    tiled: bool = False
    """Run the autoencoder in tiles: less memory, and images that differ a little. For all rows."""
    paste_back: bool = True
    """Keep the input image's pixels exactly where a mask does not repaint. For all rows."""
    resize_references: bool = True
    """Resize reference images to the nearest size of Kontext's training, about a megapixel. For all rows."""
    size_from_reference: bool = True
    """Take the size of a row without a size of its own from its first reference image. For all rows."""
    tile_size: int = 128
    """Side of a tile, from 16: in latents when decoding, in pixels when encoding. For all rows."""
    tile_stride: int = 64
    """Distance between the starts of two tiles, at most `tile_size`. For all rows."""
    num_images_per_prompt: int = Field(default=1, ge=1, le=1000)
    """Images per prompt."""
    seed: Seed = Field(default=0, ge=0, lt=MAX_SEED)
    """Seed of the run; the seeds of rows without one are derived from it."""

    @model_validator(mode="before")
    @classmethod
    def _aliases(cls, values: Any) -> Any:
        return _with_aliases(values)

    @model_validator(mode="after")
    def _in_range(self) -> SamplingConfig:
        self.params()
        check_tiles(self.tile_size, self.tile_stride)
        return self

    def params(self) -> SamplingParams:
        """Return the defaults of an image as SamplingParams, for rows and the pipeline."""
        values = {name: getattr(self, name) for name in SAMPLING_FIELDS}
        return SamplingParams(**{name: value for name, value in values.items() if value is not None})

    @property
    def guidance_text(self) -> str:
        """The embedded guidance as text for people."""
        return "that of the model" if self.embedded_guidance is None else f"{self.embedded_guidance:g}"

    def for_model(self, guidance: float) -> SamplingConfig:
        """Return this section with a model's own guidance as the default."""
        return self if self.embedded_guidance is not None else self.model_copy(update={"embedded_guidance": guidance})


class JobConfig(Section):
    """A whole job file."""

    name: str = Field(default="flux-batch", pattern=_NAME)
    """The name of the run in logs, metrics and the data set card: up to 100 letters, digits and `._-`, the first a
    letter or digit."""
    prompts: PromptsConfig
    output: OutputConfig
    model: ModelConfig
    sampling: SamplingConfig = SamplingConfig()
    quality: QualityConfig | None = None
    workers: WorkersConfig = WorkersConfig()
    failures: FailuresConfig = FailuresConfig()

    @field_validator("name", mode="before")
    @classmethod
    def _is_a_name(cls, name: Any) -> Any:
        if isinstance(name, str) and not re.fullmatch(_NAME, name):
            raise ValueError("must be up to 100 letters, digits and `._-`, and begin with a letter or a digit")
        return name

    @model_validator(mode="after")
    def _web_is_allowed(self) -> JobConfig:
        uri, field = self.sampling.input_image or "", "sampling.input_image"
        if uri.startswith(("http://", "https://")) and not self.prompts.allow_http:
            raise InvalidSetting(f"{field} is on the web: set prompts.allow_http to true", field=field)
        if re.match("[^/]*://[^/]*@", uri):
            raise InvalidSetting(f"{field} holds a user name or password, which would be stored", field=field)
        return self

    @model_validator(mode="after")
    def _columns_are_free(self) -> JobConfig:
        taken = [name for name in self.prompts.metadata_columns if name in QUALITY_COLUMNS]
        if self.quality and taken:
            raise InvalidSetting(
                f"quality: adds the column {taken[0]!r} to the metadata, which is also a column of the prompts; rename "
                "the latter",
                field="quality",
            )
        written = {*self.output.source_names, *(SOURCE_COLUMNS if self.output.sources else ())}
        if taken := [name for name in self.prompts.metadata_columns if name in written]:
            raise InvalidSetting(
                f"output.sources: writes the column {taken[0]!r}, which is also a column of the prompts; rename the "
                "latter",
                field="output",
            )
        return self

    @classmethod
    def from_yaml(cls, text: str, origin: str = "job file", overrides: Iterable[str] = ()) -> JobConfig:
        """Return the job in a YAML text, without filling in dates; `overrides`: see read_tree."""
        overrides = tuple(overrides)
        return cls.from_dict(read_tree(text, origin, overrides), origin=origin, set_keys=overridden(overrides))

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any], *, origin: str = "job", set_keys: Collection[str] = ()) -> JobConfig:
        """Return the job in a tree of plain values; `set_keys` are the keys that `--set` has set. Raises: JobError.

        >>> job = {"prompts": {"uri": "prompts.csv"}, "output": {"uri": "out"}, "model": {"uri": "demo"}}
        >>> JobConfig.from_dict(job).sampling.num_inference_steps
        28
        >>> JobConfig.from_dict({**job, "sampling": {"widht": 512}})
        Traceback (most recent call last):
        flux_batch.errors.JobError: job: sampling.widht: unknown key; did you mean 'width'?
        """
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise JobError("\n".join(explain(error, JobConfig, origin, set_keys))) from error

    def to_yaml(self) -> str:
        """Return the whole tree as YAML, with every default written out and every secret redacted."""
        tree = public_tree(self.model_dump(mode="json", exclude=_STORAGE_OPTIONS))
        for section in _STORAGE_OPTIONS:
            tree[section]["storage_options"] = redact(getattr(self, section).storage_options)
        return to_yaml(tree)

    def identity(self) -> dict[str, Any]:
        """Return the settings that change images, keys or files, by dotted key; a resumed run must have the same.

        The addresses of prompts and output and the number of workers do not belong to them.
        """
        tree = public_tree(self.model_dump(mode="json", exclude=_STORAGE_OPTIONS))
        parts = {
            "prompts": {key: tree["prompts"][key] for key in _PROMPTS_IDENTITY},
            "output": {key: tree["output"][key] for key in ("format", "shard_size", "sources")},
            "output.image": tree["output"]["image"],
            "model": {key: tree["model"][key] for key in _MODEL_IDENTITY},
            "sampling": tree["sampling"],
            "quality": {key: (tree["quality"] or {}).get(key) for key in _QUALITY_IDENTITY},
        }
        return {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()}
