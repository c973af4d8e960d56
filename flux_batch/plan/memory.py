"""A rough estimate of a worker's memory, and the cards that have it.

It is counted from the headers of the checkpoint and the job's sizes; no weights are read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flux_batch.config.schema import JobConfig
from flux_batch.download.models import find_local_model
from flux_batch.errors import FluxBatchError
from flux_batch.model.checkpoint.checkpoint import open_checkpoint
from flux_batch.model.checkpoint.detect import PART_TITLES, find_parts, read_shapes
from flux_batch.model.checkpoint.image_prompts import ip_adapter_files, redux_files, tower_of
from flux_batch.model.conditions.variant import is_kontext
from flux_batch.model.footprint import decode_bytes, denoise_bytes, residual_bytes, transformer_size, weight_bytes
from flux_batch.model.params import Shapes
from flux_batch.sampling_params import num_image_tokens

# A card of 24 GB has 24 x 2^30 bytes and is counted as 24 x 10^9: what is between the two, 7 %, is left to CUDA, to
# the convolutions' workspace and to what the allocator cannot use.
_CARDS_GB = (16, 24, 40, 48, 80, 141)
CHOICES = (
    ("bfloat16", "none"),
    ("bfloat16", "fp8"),
    ("bfloat16", "fp8_matmul"),
    ("float16", "none"),
    ("float16", "fp8"),
    ("float32", "none"),
)
# Text tokens of a job that does not say: those of FLUX.1-dev.
TEXT_TOKENS = 512
# Image tokens of a reference image at the sizes that Kontext was trained with: from 4042 to 4150.
_REFERENCE_TOKENS = 4096
# Tokens of an image prompt: the patches of SigLIP so400m.
_PROMPT_TOKENS = 729
# What reads image prompts, and its vision tower.
_PROMPT_PARTS = ("redux", "ip_adapter", "image_encoder")


def reference_tokens(config: JobConfig) -> int:
    """Return the tokens that a reference image adds to each step of a Kontext; 0 for any other model.

    A Kontext is told by its names: rows are not read.
    """
    model = config.model
    return _REFERENCE_TOKENS if is_kontext(model.variant, model.uri.split("/")) else 0


def controlnet_shapes(config: JobConfig) -> dict[str, Shapes]:
    """Return the shapes of each ControlNet of a job, by address. Raises: ValueError for one not on this machine."""
    model, found = config.model, {}
    for uri in dict.fromkeys(net.uri for net in model.controlnets):
        source = find_local_model(uri, model.storage_options)
        if source is None:
            raise ValueError(f"{uri} is not on this machine")
        found[uri] = read_shapes([source])["controlnet"]
    return found


def prompt_tokens(config: JobConfig) -> int:
    """Return the tokens that an image prompt adds to a job's texts; 0 without Redux.

    Counted for one image a row: rows are not read.
    """
    return _PROMPT_TOKENS if config.model.redux else 0


def _prompt_shapes(config: JobConfig) -> dict[str, Shapes]:
    """Return the shapes of what reads image prompts, and of its vision tower. Raises: ValueError if not here."""
    model, find = config.model, (ip_adapter_files if config.model.ip_adapter else redux_files)
    reader = model.redux or model.ip_adapter
    if reader is None:
        return {}
    addresses = [uri for uri in (*reader.uris, reader.image_encoder) if uri]
    here = {uri: find_local_model(uri, model.storage_options) for uri in addresses}
    if missing := [uri for uri, path in here.items() if path is None]:
        raise ValueError(f"{missing[0]} is not on this machine")
    tower = here[reader.image_encoder] if reader.image_encoder else None
    # A tower that several have in common is loaded once.
    files = [find(source, tower) for uri in reader.uris if (source := here[uri])]
    part, encoders = "redux" if model.redux else "ip_adapter", dict.fromkeys(encoder for _, encoder in files)
    return {
        part: _joined(open_checkpoint(file).shapes for file, _ in files),
        "image_encoder": _joined(tower_of(open_checkpoint(encoder)).shapes for encoder in encoders),
    }


def _joined(models: Iterable[Shapes]) -> Shapes:
    """Return the shapes of several models as those of one."""
    return {f"{number}.{name}": shape for number, shapes in enumerate(models) for name, shape in shapes.items()}


def memory(config: JobConfig) -> dict[str, Any]:
    """Return a worker's bytes by part, for the job and for other dtypes and quantizations.

    Sizes of rows are not read. `least_bytes` are those where memory is short. `error` says why the model cannot be
    counted, such as one not on this machine.
    """
    model = config.model
    if model.pipeline:
        return {"error": f"the pipeline {model.pipeline} does not say what it needs"}
    try:
        source = find_local_model(model.uri, model.storage_options)
        if source is None:
            return {"error": f"{model.uri} is not on this machine"}
        parts = read_shapes(find_parts(source)) | _prompt_shapes(config)
        nets = controlnet_shapes(config)
        scorer = _scorer_bytes(config)
        needed = _parts_bytes(config, parts, nets, _expected_dtype(config), model.quantization) | scorer
        least = _parts_bytes(config, parts, nets, *_least_choice(config)) | scorer
        others = {choice: _parts_bytes(config, parts, nets, *choice) | scorer for choice in CHOICES}
    except (FluxBatchError, ValueError, KeyError, OSError) as error:
        return {"error": str(error)}
    return {
        "batch_size": _batch_size_of(config),
        "bytes": needed,
        **_fit(sum(needed.values())),
        "least_bytes": sum(least.values()),
        "choices": [
            {"dtype": dtype, "quantization": quantization, **_fit(sum(sizes.values()))}
            for (dtype, quantization), sizes in others.items()
        ],
    }


def _parts_bytes(
    config: JobConfig, parts: dict[str, Shapes], nets: dict[str, Shapes], dtype: str, quantization: str
) -> dict[str, int]:
    """Return the bytes of each part's weights and of the activations: the larger of denoising and decoding.

    The text encoders' activations are smaller than either, but for images that are themselves small. Encoders that
    are offloaded take none of their own, but what the activations take while there are none. With CUDA graphs, what
    denoising takes is taken throughout. The residuals of ControlNets are there while the transformer runs, and their
    sum beside them if there are several.
    """
    sampling, batch_size = config.sampling, _batch_size_of(config)
    width, height = sampling.width, sampling.height
    num_tokens = num_image_tokens(width, height) + reference_tokens(config)
    num_tokens += (sampling.t5_sequence_length or TEXT_TOKENS) + prompt_tokens(config)
    denoise = denoise_bytes(parts["transformer"], num_tokens, batch_size, dtype, quantization)
    base, of_image = transformer_size(parts["transformer"]), num_image_tokens(width, height)
    added = [residual_bytes(nets[net.uri], base, of_image, batch_size, dtype) for net in config.model.controlnets]
    denoise += sum(added) * (2 if len(added) > 1 else 1)
    if sampling.tiled:
        width, height = min(width, 8 * sampling.tile_size), min(height, 8 * sampling.tile_size)
    decode = decode_bytes(parts["autoencoder"], width, height, batch_size, dtype)
    weights = {part: weight_bytes(part, parts[part], dtype, quantization) for part in PART_TITLES}
    weights |= {part: weight_bytes(part, parts[part], dtype) for part in _PROMPT_PARTS if part in parts}
    if nets:
        weights["controlnets"] = sum(weight_bytes("transformer", each, dtype, quantization) for each in nets.values())
    visiting = 0
    if config.model.offload_text_encoders:
        visiting = weights["clip"] + weights["t5"]
        weights |= {"clip": 0, "t5": 0}
    rest = max(decode, visiting)
    return weights | {"activations": denoise + rest if config.model.cuda_graphs else max(denoise, rest)}


def _scorer_bytes(config: JobConfig) -> dict[str, int]:
    """Return the bytes of the model that judges images beside the pipeline; empty for a judge without one.

    They are those of its files, as it is loaded in their dtype. One of somebody's own does not say what it needs.
    Raises: ValueError for a model that is not on this machine.
    """
    quality = config.quality
    if quality is None or (uri := quality.model_uri) is None:
        return {}
    if config.workers.num_gpus and quality.options.get("device") == "cpu":
        return {}
    if (source := find_local_model(uri)) is None:
        raise ValueError(f"{uri}, by which quality.score judges, is not on this machine")
    files = [path for suffix in ("safetensors", "bin") for path in source.glob(f"*.{suffix}")]
    return {"scorer": sum(path.stat().st_size for path in files if path.suffix == files[0].suffix)}


def _expected_dtype(config: JobConfig) -> str:
    """Return the dtype of the job; for `auto` bfloat16, as GPUs of today take it, or this CPU's own without GPUs."""
    if config.model.dtype != "auto":
        return config.model.dtype
    if config.workers.num_gpus:
        return "bfloat16"
    from flux_batch.model.optimize.dtypes import dtype_name, native_dtype  # torch: seconds of imports

    return dtype_name(native_dtype("cpu"))


def _least_choice(config: JobConfig) -> tuple[str, str]:
    """Return the dtype and the quantization of the job where memory is short.

    A CPU then keeps matrices in bfloat16.
    """
    dtype, quantization = _expected_dtype(config), config.model.quantization
    is_narrowed = not config.workers.num_gpus and config.model.dtype == "auto" and dtype == "float32"
    return dtype, "bfloat16" if is_narrowed and quantization == "none" else quantization


def _batch_size_of(config: JobConfig) -> int:
    """Return the number of images in one forward pass; for `auto` 1, the least that must fit."""
    size = config.workers.batch_size
    return 1 if size == "auto" else size


def _fit(num_bytes: int) -> dict[str, Any]:
    """Return the sum and the cards that have as many bytes."""
    return {"total_bytes": num_bytes, "fits_gb": [card for card in _CARDS_GB if num_bytes <= card * 10**9]}


def memory_rows(figures: dict[str, Any], *, has_cards: bool = True) -> list[tuple[str, str]]:
    """Return the figures as rows of a table; other dtypes are there where not all of them fit on the same cards.

    has_cards: whether workers have a GPU.
    """
    if "error" in figures:
        return [("memory", f"not known: {figures['error']}")]
    parts = ", ".join(f"{part} {_gigabytes(size)}" for part, size in figures["bytes"].items())
    fits = f", {_cards(figures)}" if has_cards else ""
    rows = [
        ("memory", f"about {_gigabytes(figures['total_bytes'])} GB a worker{fits}"),
        ("", f"in batches of {figures['batch_size']}: {parts}"),
    ]
    choices = figures["choices"] if has_cards else []
    if len({tuple(choice["fits_gb"]) for choice in choices}) > 1:
        rows += [("" if number else "or with", _choice_text(choice)) for number, choice in enumerate(choices)]
    return rows


def _choice_text(choice: dict[str, Any]) -> str:
    quantization = "" if choice["quantization"] == "none" else f", {choice['quantization']}"
    return f"{choice['dtype']}{quantization}: {_gigabytes(choice['total_bytes'])} GB, {_cards(choice)}"


def _cards(figures: dict[str, Any]) -> str:
    """Return the cards that are large enough as text."""
    cards = figures["fits_gb"]
    return f"fits a card of {cards[0]} GB" if cards else "more than a card has"


def _gigabytes(num_bytes: int) -> str:
    """Return a size in GB of 10^9 bytes, no finer than it is known."""
    return f"{num_bytes / 1e9:.2g}" if num_bytes < 1e9 else f"{num_bytes / 1e9:.1f}"
