"""Detection of the parts of a model by keys, in a checkpoint or a folder.

The known layouts: the original one (black-forest-labs/flux 802fb47, whose keys are the names of our modules); that of
diffusers (58eb52c); that of transformers for the text encoders; that of llama.cpp for T5 (package gguf 0.19,
constants.py). ComfyUI's all-in-one files hold all four parts, each under a prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import Enum
from pathlib import Path

from flux_batch.model.checkpoint.checkpoint import Checkpoint, first_names, open_checkpoint, weight_files
from flux_batch.model.checkpoint.files import is_pickle, is_shard
from flux_batch.model.checkpoint.scaled_fp8 import SCALED_FP8_MARKER, declared_formats, pair_scales
from flux_batch.model.params import Shapes


class CheckpointKind(Enum):
    """The kinds of checkpoints; each value is the start of a key that only this kind has.

    The exception is a ControlNet, which also has the keys of a transformer.
    """

    TRANSFORMER = "double_blocks."
    TRANSFORMER_DIFFUSERS = "transformer_blocks."
    AUTOENCODER = "decoder.up."
    AUTOENCODER_DIFFUSERS = "decoder.up_blocks."
    CLIP = "embeddings.token_embedding."
    T5 = "encoder.block."
    CONTROLNET = "controlnet_blocks."

    @property
    def part(self) -> str:
        """The part of a model: transformer, autoencoder, clip or t5; or controlnet, which is loaded beside a model."""
        return self.name.removesuffix("_DIFFUSERS").lower()


# Key prefixes of all-in-one files, community files and CLIP files -> part; longest first.
PART_PREFIXES = {
    "text_encoders.clip_l.transformer.text_model.": "clip",
    "text_encoders.clip_l.transformer.": "clip",
    "text_encoders.clip_l.": "clip",
    "text_model.": "clip",
    "text_encoders.t5xxl.transformer.": "t5",
    "text_encoders.t5xxl.": "t5",
    "model.diffusion_model.": "transformer",
    "diffusion_model.": "transformer",
    "first_stage_model.": "autoencoder",
    "vae.": "autoencoder",
}
# Names of the norm scales in torchtitan and ComfyUI -> original names.
_NORM_KEYS = {".query_norm.weight": ".query_norm.scale", ".key_norm.weight": ".key_norm.scale"}
_LLAMA_CPP_T5 = "enc.blk."
_LLAMA_CPP_NAMES = {
    "token_embd": "shared",
    "enc.output_norm": "encoder.final_layer_norm",
    "output_norm": "encoder.final_layer_norm",
}
LLAMA_CPP_BLOCK_NAMES = {
    "attn_norm": "layer.0.layer_norm",
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "ffn_norm": "layer.1.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
}
# Keys in some files that FLUX.1 does not use.
UNUSED_KEYS = {
    "clip": {"logit_scale", "text_projection", "text_projection.weight", "embeddings.position_ids"},
    "t5": {"logit_scale", "spiece_model"},
}
# Patterns of keys that only one unsupported kind of file has, with its name; the first match counts.
_USE_INSTEAD = "use the bf16, fp8 or GGUF file of the same model"
_UNSUPPORTED = (
    (
        r"\.quant_state\.bitsandbytes__|\.absmax$|\.SCB$",
        f"it is quantised by bitsandbytes (as NF4): {_USE_INSTEAD}",
    ),
    (r"\.(wscales|wzeros|wtscale|wcscales)$", f"it is quantised by Nunchaku (SVDQuant): {_USE_INSTEAD}"),
    (r"\.qweight$|\.weight\._data$|\.encoded_exponent$", f"it is quantised in an unknown way: {_USE_INSTEAD}"),
    (r"(^|\.)lora_(up|down|A|B)\b|^lora_(unet|te\d?)_|\.lora\.|_lora\d?\.|\.(lokr|hada)_", "it is a LoRA, not a model"),
    (r"^single_controlnet_blocks\.|^controlnet_blocks\.\d+\.linear\.", "it is MistoLine's kind of ControlNet"),
    (
        r"(^|\.)(control_model|controlnet_cond_embedding|controlnet_(down|mid)_blocks?)\.",
        "it is a ControlNet of Stable Diffusion or SDXL",
    ),
    (r"^redux_(up|down)\.", "it is FLUX.1-Redux, loaded beside a model: model.redux, load_redux"),
    (r"ip_adapter|^image_proj\.", "it is an IP-Adapter, loaded beside a model: model.ip_adapter, load_ip_adapter"),
    (r"(double|single)_stream_modulation|^(vae\.|first_stage_model\.)?bn\.running_mean$", "it is FLUX.2"),
    (r"(^|\.)distilled_guidance_layer\.", "it is Chroma"),
    (r"(^|\.)joint_blocks\.", "it is Stable Diffusion 3"),
    (r"(^|\.)input_blocks\.\d|^(unet\.)?down_blocks\.\d", "it is the UNet of Stable Diffusion or SDXL"),
)
# Component folders of diffusers by part.
_PART_FOLDERS = {"transformer": "transformer", "autoencoder": "vae", "clip": "text_encoder", "t5": "text_encoder_2"}
PART_TITLES = {
    "transformer": "transformer",
    "autoencoder": "autoencoder",
    "clip": "CLIP text encoder",
    "t5": "T5 text encoder",
}
# Text encoders come first, so that a missing tokenizer is reported before anything large is read.
LOADING_ORDER = ("clip", "t5", "autoencoder", "transformer")


def detect(checkpoint: Checkpoint) -> tuple[CheckpointKind, Checkpoint]:
    """Return the kind of a checkpoint of one part, and the checkpoint with normalized keys.

    Raises: ValueError if its kind is unknown, or if it holds several parts.
    """
    parts = parts_of(checkpoint)
    if len(parts) > 1:
        raise ValueError(f"{checkpoint.source} holds several parts: {', '.join(kind.part for kind in parts)}")
    return next(iter(parts.items()))


def parts_of(checkpoint: Checkpoint) -> dict[CheckpointKind, Checkpoint]:
    """Return the parts of a model in a checkpoint (usually one), each with normalized keys.

    Raises: ValueError for another kind of file, with the name of its kind or with its keys.
    """
    refuse_unsupported(checkpoint)
    formats = {_split_prefix(layer)[1]: kind for layer, kind in declared_formats(checkpoint).items()}
    parts = {}
    for part, names in _names_by_part(checkpoint).items():
        needed = {old: new for old, new in names.items() if new not in UNUSED_KEYS.get(part, ())}
        kind = _detect_kind(checkpoint, needed.values())
        if kind.part != part:
            raise ValueError(f"{checkpoint.source} holds keys of the {kind.part} where those of the {part} should be")
        parts[kind] = pair_scales(checkpoint.rename(needed), formats)
    return parts


def read_shapes(paths: Iterable[Path]) -> dict[str, Shapes]:
    """Read the shapes of each part of a model from the headers of its files. Raises: ValueError if one is damaged."""
    shapes: dict[str, Shapes] = {}
    for path in paths:
        for kind, checkpoint in parts_of(open_checkpoint(path)).items():
            shapes.setdefault(kind.part, checkpoint.shapes)
    return shapes


def _names_by_part(checkpoint: Checkpoint) -> dict[str, dict[str, str]]:
    """Return the keys of each part: key in the file -> normalized key without prefix."""
    by_part: dict[str, dict[str, str]] = {}
    bare: dict[str, str] = {}
    for name in checkpoint.tensors:
        part, rest = _split_prefix(name)
        (by_part.setdefault(part, {}) if part else bare)[name] = _normalized_key(rest)
    if any(name.startswith(_LLAMA_CPP_T5) for name in bare):
        bare = {name: plain for name in bare if (plain := from_llama_cpp(name))}
    for part, names in by_part.items():
        # A key that exists both with and without the prefix goes to one part, where `rename` reports the duplicate.
        known = set(names.values())
        known |= {SCALED_FP8_MARKER, *UNUSED_KEYS.get(part, ())}
        twice = {name: new for name, new in bare.items() if new in known}
        names.update(twice)
        bare = {name: new for name, new in bare.items() if name not in twice}
    if bare or not by_part:
        by_part.setdefault(_detect_kind(checkpoint, bare.values()).part, {}).update(bare)
    return by_part


def _detect_kind(checkpoint: Checkpoint, names: Iterable[str]) -> CheckpointKind:
    """Return the kind that has these normalized keys. Raises: ValueError unless exactly one kind fits."""
    names = sorted(names)
    found = [kind for kind in CheckpointKind if any(name.startswith(kind.value) for name in names)]
    if CheckpointKind.CONTROLNET in found:
        return CheckpointKind.CONTROLNET
    if len(found) > 1:
        raise ValueError(f"{checkpoint.source} holds several models under the same prefix: use one file for each")
    if not found:
        raise ValueError(
            f"{checkpoint.source} is not a FLUX.1 transformer, autoencoder, CLIP or T5: "
            f"its keys are {first_names(names)}"
        )
    return found[0]


def refuse_unsupported(checkpoint: Checkpoint) -> None:
    """Raise ValueError for a checkpoint of a known unsupported kind."""
    for pattern, what in _UNSUPPORTED:
        known = re.compile(pattern)
        if keys := [name for name in checkpoint.tensors if known.search(name)]:
            raise ValueError(f"{checkpoint.source} is not supported: {what} (its keys: {first_names(keys, 1)})")


def _split_prefix(name: str) -> tuple[str, str]:
    """Return the part that a key's prefix names, and the rest of the key.

    The part is "" without a prefix.
    """
    for prefix, part in PART_PREFIXES.items():
        if name.startswith(prefix):
            return part, name.removeprefix(prefix)
    return "", name


def _normalized_key(name: str) -> str:
    """Return a key with the original layout's names for norm scales."""
    for ending, original in _NORM_KEYS.items():
        if name.endswith(ending):
            return name.removesuffix(ending) + original
    return name


def from_llama_cpp(name: str) -> str | None:
    """Return transformers' key for a key of llama.cpp's T5; None for a key of the decoder."""
    if name.startswith("dec.") or name == "output.weight":
        return None
    stem, _, kind = name.rpartition(".")
    block, _, layer = stem.removeprefix(_LLAMA_CPP_T5).partition(".")
    if stem.startswith(_LLAMA_CPP_T5) and layer in LLAMA_CPP_BLOCK_NAMES:
        return f"encoder.block.{block}.{LLAMA_CPP_BLOCK_NAMES[layer]}.{kind}"
    return f"{_LLAMA_CPP_NAMES[stem]}.{kind}" if stem in _LLAMA_CPP_NAMES else name


def find_parts(source: Path) -> list[Path]:
    """Return the files and folders of the model at `source`, a folder or one file.

    A part is looked for in its component folder, then among the files of the folder itself, by their keys.
    Raises: ValueError for a missing part, or for several files with the same part.
    """
    if source.is_file():
        _check_all_in_one(source)
        return [source]
    found = {part: [source / name] for part, name in _PART_FOLDERS.items() if _has_weights(source / name)}
    others: list[str] = []
    for path in weight_files(source) if len(found) < len(_PART_FOLDERS) else ():
        try:
            kinds = parts_of(open_checkpoint(path))
        except ValueError as error:
            others.append(str(error))
            continue
        parts = [kind.part for kind in kinds]
        if CheckpointKind.CONTROLNET in kinds:
            others.append(f"{path} is a ControlNet")
            continue
        # The single files of the official repositories hold the same weights as the component folders.
        if not all(source / _PART_FOLDERS[part] in found.get(part, ()) for part in parts):
            for part in parts:
                found.setdefault(part, []).append(path)
    for part, paths in found.items():
        if len(paths) > 1:
            names = ", ".join(path.name for path in paths)
            is_sharded = all(is_shard(path.name) for path in paths)
            instead = f"put the shards of a model into a folder {_PART_FOLDERS[part]}" if is_sharded else "keep one"
            raise ValueError(f"{source} holds several files for the {PART_TITLES[part]}: {names}; {instead}")
    for part, title in PART_TITLES.items():
        if part not in found:
            looked = (
                f"looked for {source / _PART_FOLDERS[part]}/*.safetensors or *.gguf and for such a file in {source}"
            )
            raise ValueError("; ".join([f"no {title}: {looked}", *others]))
    return list(dict.fromkeys(found[part][0] for part in LOADING_ORDER))


def _check_all_in_one(path: Path) -> None:
    """Raise ValueError unless a file holds all parts of a model."""
    parts = {kind.part for kind in parts_of(open_checkpoint(path))}
    if missing := [title for part, title in PART_TITLES.items() if part not in parts]:
        raise ValueError(
            f"{path} holds no {' and no '.join(missing)}: put it into a folder with the other parts and pass it"
        )


def _has_weights(folder: Path) -> bool:
    """Return whether a folder holds weights or pickles. Opening the folder then refuses pickles with a clear error."""
    if not folder.is_dir():
        return False
    return bool(weight_files(folder)) or any(is_pickle(path.name) for path in folder.iterdir())
