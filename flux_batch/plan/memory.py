"""A rough estimate of a worker's memory, and the GPU memory sizes that suffice.

It is computed from the checkpoint's headers and the job's sizes; no weights are read.
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

# A card of 24 GB has 24 x 2^30 bytes but counts as 24 x 10^9. The difference, 7 %, is for CUDA, the workspace of
# convolutions and fragmentation of the allocator.
_CARDS_GB = (16, 24, 40, 48, 80, 141)
CHOICES = (
    ("bfloat16", "none"),
    ("bfloat16", "fp8"),
    ("bfloat16", "fp8_matmul"),
    ("float16", "none"),
    ("float16", "fp8"),
    ("float32", "none"),
)
# Text tokens if a job sets no number: those of FLUX.1-dev.
TEXT_TOKENS = 512
# Tokens of a reference image: 4042 to 4150 at the sizes of Kontext's training.
_REFERENCE_TOKENS = 4096
# Tokens of an image prompt: the patches of SigLIP so400m.
_PROMPT_TOKENS = 729
# The model parts that read image prompts.
_PROMPT_PARTS = ("redux", "ip_adapter", "image_encoder")


def reference_tokens(config: JobConfig) -> int:
    """Return the tokens that a reference image adds to each step of a Kontext model; 0 for other models.

    Kontext is recognised by the variant or the model's names. Rows are not read.
    """
    model = config.model
    return _REFERENCE_TOKENS if is_kontext(model.variant, model.uri.split("/")) else 0


def controlnet_shapes(config: JobConfig) -> dict[str, Shapes]:
    """Return the shapes of a job's ControlNets, by address. Raises: ValueError for one not on this machine."""
    model, found = config.model, {}
    for uri in dict.fromkeys(net.uri for net in model.controlnets):
        source = find_local_model(uri, model.storage_options)
        if source is None:
            raise ValueError(f"{uri} is not on this machine")
        found[uri] = read_shapes([source])["controlnet"]
    return found


def prompt_tokens(config: JobConfig) -> int:
    """Return the tokens that an image prompt adds to the text tokens; 0 without Redux.

    They are counted for one image per row, since rows are not read.
    """
    return _PROMPT_TOKENS if config.model.redux else 0


def _prompt_shapes(config: JobConfig) -> dict[str, Shapes]:
    """Return the shapes of Redux or IP-Adapters, and of their image encoder. Raises: ValueError if not here."""
    model, find = config.model, (ip_adapter_files if config.model.ip_adapter else redux_files)
    reader = model.redux or model.ip_adapter
    if reader is None:
        return {}
    addresses = [uri for uri in (*reader.uris, reader.image_encoder) if uri]
    here = {uri: find_local_model(uri, model.storage_options) for uri in addresses}
    if missing := [uri for uri, path in here.items() if path is None]:
        raise ValueError(f"{missing[0]} is not on this machine")
    tower = here[reader.image_encoder] if reader.image_encoder else None
    # An image encoder that several adapters share is loaded once.
    files = [find(source, tower) for uri in reader.uris if (source := here[uri])]
    part, encoders = "redux" if model.redux else "ip_adapter", dict.fromkeys(encoder for _, encoder in files)
    return {
        part: _joined(open_checkpoint(file).shapes for file, _ in files),
        "image_encoder": _joined(tower_of(open_checkpoint(encoder)).shapes for encoder in encoders),
    }


def _joined(models: Iterable[Shapes]) -> Shapes:
    """Return the shapes of several models, with names prefixed by their number."""
    return {f"{number}.{name}": shape for number, shapes in enumerate(models) for name, shape in shapes.items()}


def memory(config: JobConfig) -> dict[str, Any]:
    """Return a worker's bytes by part, for the job and for other dtypes and quantizations.

    Sizes in rows are not read. `least_bytes` is the total if memory is short. `error` says why the model's memory is
    not known, e.g. if it is not on this machine.
    """
    model = config.model
    if model.pipeline:
        return {"error": f"the pipeline {model.pipeline} does not say how much it needs"}
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

    The activations of text encoders are smaller than both, except for small images. Offloaded text encoders use the
    memory of the activations while these do not exist. With CUDA graphs, the memory of denoising is held all the time.
    The residuals of ControlNets exist while the transformer runs; for several ControlNets, their sum exists as well.
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
    """Return the bytes of the scorer's model; empty if it has none.

    They are the sizes of its files, since it is loaded in their dtype. A scorer on the CPU beside a pipeline on a GPU
    is not counted, and the memory of a user's own scorer is not known.
    Raises: ValueError for a model that is not on this machine.
    """
    quality = config.quality
    if quality is None or (uri := quality.model_uri) is None:
        return {}
    if config.workers.num_gpus and quality.options.get("device") == "cpu":
        return {}
    if (source := find_local_model(uri)) is None:
        raise ValueError(f"{uri}, the model of quality.score, is not on this machine")
    files = [path for suffix in ("safetensors", "bin") for path in source.glob(f"*.{suffix}")]
    return {"scorer": sum(path.stat().st_size for path in files if path.suffix == files[0].suffix)}


def _expected_dtype(config: JobConfig) -> str:
    """Return the dtype of the job; for `auto`, bfloat16 on GPUs, and this CPU's native dtype without."""
    if config.model.dtype != "auto":
        return config.model.dtype
    if config.workers.num_gpus:
        return "bfloat16"
    from flux_batch.model.optimize.dtypes import dtype_name, native_dtype  # imports torch, which takes seconds

    return dtype_name(native_dtype("cpu"))


def _least_choice(config: JobConfig) -> tuple[str, str]:
    """Return the dtype and the quantization that the job uses if memory is short.

    A CPU then stores matrices in bfloat16.
    """
    dtype, quantization = _expected_dtype(config), config.model.quantization
    is_narrowed = not config.workers.num_gpus and config.model.dtype == "auto" and dtype == "float32"
    return dtype, "bfloat16" if is_narrowed and quantization == "none" else quantization


def _batch_size_of(config: JobConfig) -> int:
    """Return the number of images in one forward pass; 1 for `auto`, which must fit at least."""
    size = config.workers.batch_size
    return 1 if size == "auto" else size


def _fit(num_bytes: int) -> dict[str, Any]:
    """Return the total and the cards, in GB, that it fits."""
    return {"total_bytes": num_bytes, "fits_gb": [card for card in _CARDS_GB if num_bytes <= card * 10**9]}


def memory_rows(figures: dict[str, Any], *, has_cards: bool = True) -> list[tuple[str, str]]:
    """Return the figures as rows of a table; other dtypes are shown if they fit on different cards.

    has_cards: True if workers have a GPU.
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
    """Return the smallest sufficient card as text."""
    cards = figures["fits_gb"]
    return f"fits a card of {cards[0]} GB" if cards else "fits no card"


def _gigabytes(num_bytes: int) -> str:
    """Return a size in GB of 10^9 bytes, with few digits."""
    return f"{num_bytes / 1e9:.2g}" if num_bytes < 1e9 else f"{num_bytes / 1e9:.1f}"
