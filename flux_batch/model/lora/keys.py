"""The mapping from the keys of a LoRA file to rows of the model's weights.

A module of a LoRA is a group of keys with one stem (`...img_attn.qkv`) and a suffix for each role (`.lora_A.weight`).
Stems follow the original names (kohya's sd-scripts with underscores, ComfyUI with dots), diffusers' (PEFT, ai-toolkit;
OneTrainer and LyCORIS with underscores), those of XLabs-AI/x-flux 1da87eb (src/flux/modules/layers.py), those of
modelscope/DiffSynth-Studio 0426080 (diffsynth/models/flux_dit.py), or OMI's: the original names with numbered pieces
(Nerogar/OneTrainer a44be32, modules/util/convert/lora/convert_flux_lora.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from flux_batch.model.checkpoint.checkpoint import first_names
from flux_batch.model.checkpoint.detect import PART_PREFIXES, UNUSED_KEYS
from flux_batch.model.checkpoint.diffusers_keys import transformer_rules
from flux_batch.model.params import Shapes

# Prefix of a stem -> part of the model.
_DOTTED_PREFIXES = {
    **PART_PREFIXES,
    "pipe.dit.": "transformer",
    "transformer.": "transformer",
    "text_encoder.text_model.": "clip",
    "text_encoder.": "clip",
    "text_encoder_2.": "t5",
    # OneTrainer with OMI's names.
    "clip_l.text_model.": "clip",
    "clip_l.": "clip",
    "t5.": "t5",
}
_UNDERSCORED_PREFIXES = {
    "lora_unet_": ("transformer",),
    "lora_transformer_": ("transformer",),
    "lycoris_": ("transformer",),
    # Trainers number the text encoders differently: CLIP is te or te1, T5 is te2 (OneTrainer) or te3 (kohya).
    **{f"lora_te{number}_{model}": ("clip", "t5") for number in ("", 1, 2, 3) for model in ("text_model_", "")},
}
PEFT_WRAPPER = "base_model.model."

# PEFT's adapters have a name, which is part of the keys in older files: lora_A.default.weight.
_ADAPTER_NAME = r"(?:\.default|\.[\w-]+(?=\.(?:weight|bias)$))?"
_ROLE_PATTERNS = {
    "down": rf"\.lora_(?:down|A){_ADAPTER_NAME}(?:\.weight)?$|\.(?:lora\.|lora_linear_layer\.)?down\.weight$",
    "up": rf"\.lora_(?:up|B){_ADAPTER_NAME}(?:\.weight)?$|\.(?:lora\.|lora_linear_layer\.)?up\.weight$",
    "bias": rf"\.lora_(?:up|B){_ADAPTER_NAME}\.bias$",
    "alpha": r"\.alpha$",
    "magnitude": rf"\.dora_scale$|\.lora_magnitude_vector{_ADAPTER_NAME}(?:\.weight)?$",
    **{name: rf"\.{name}$" for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    **{name: rf"\.{name}$" for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")},
    "diff": r"\.(?:diff|w_norm)$",
    "diff_b": r"\.(?:diff_b|b_norm)$",
    # Norm scales of control LoRAs by BFL or trained with diffusers; they replace the model's.
    "set": r"(?<=_norm)\.scale$|(?<=\.norm_[qk])\.weight$|(?<=\.norm_added_[qk])\.weight$",
}
# Patterns of keys that only one unsupported kind of file has.
_UNSUPPORTED = (
    (r"\.(oft_blocks|oft_diag|oft_R|boft_[RS])\b", "it is of the kind OFT"),
    (r"\.[ab][12]\.weight$", "it is of the kind GLoRA"),
    (r"\.(lora_mid|hada_t[12]|lokr_t[12])\b", "it is made for convolutions, and FLUX.1 has none"),
    (r"^bundle_emb\.|^emb_params$|^string_to_param\b", "it holds embeddings of new words (textual inversion)"),
)
# Keys of control LoRAs that another program has converted; every full model has keys of these norms as well.
_CONVERTED_CONTROL_KEYS = r"(query_norm|key_norm)\.weight$|\.reshape_weight$"
# Layers of FLUX.2 and Chroma, whose other layers have the names of FLUX.1's.
_OTHER_MODEL_KEYS = r"double_stream_modulation|single_stream_modulation|distilled_guidance_layer|to_qkv_mlp_proj"

_XLABS_NAMES = {
    ".img_attn.qkv": ".processor.qkv_lora1",
    ".txt_attn.qkv": ".processor.qkv_lora2",
    ".img_attn.proj": ".processor.proj_lora1",
    ".txt_attn.proj": ".processor.proj_lora2",
    ".linear2": ".processor.proj_lora",
}
_DIFFSYNTH_NAMES = {
    "double_blocks.": "blocks.",
    ".img_mod.lin": ".norm1_a.linear",
    ".txt_mod.lin": ".norm1_b.linear",
    ".img_attn.qkv": ".attn.a_to_qkv",
    ".txt_attn.qkv": ".attn.b_to_qkv",
    ".img_attn.proj": ".attn.a_to_out",
    ".txt_attn.proj": ".attn.b_to_out",
    ".img_mlp": ".ff_a",
    ".txt_mlp": ".ff_b",
    ".modulation.lin": ".norm.linear",
    ".linear1": ".to_qkv_mlp",
    ".linear2": ".proj_out",
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.": "time_embedder.timestep_embedder.",
    "guidance_in.": "guidance_embedder.timestep_embedder.",
    "vector_in.": "pooled_text_embedder.",
    ".in_layer": ".0",
    ".out_layer": ".2",
    "final_layer.linear": "final_proj_out",
    "final_layer.adaLN_modulation.1": "final_norm_out.linear",
}


@dataclass(frozen=True, slots=True)
class Target:
    """The rows of a layer that a module of a LoRA changes.

    `layer`: its name in the part (transformer, clip, t5); `rows`: start and end, None for all; `swaps_halves`: True if
    the module has rows (scale, shift) where ours are (shift, scale); `pieces`: if diffusers has several layers for this
    one, the number of rows of each.
    """

    part: str
    layer: str
    rows: tuple[int, int] | None = None
    swaps_halves: bool = False
    pieces: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class LoraModule:
    """The keys of one stem, by role."""

    stem: str
    target: Target
    keys: dict[str, str] = field(default_factory=dict)


def find_modules(source: str, names: Iterable[str], parts: Mapping[str, Shapes]) -> list[LoraModule]:
    """Return the modules of a LoRA, sorted, each with its target in a model.

    names: the keys of the LoRA; parts: the shapes of the model.
    Raises: ValueError for another kind of file, or with the keys that match nothing.
    """
    names = sorted(names)
    _refuse_unsupported(source, names)
    known = _KnownLayers(parts)
    modules: dict[str, LoraModule] = {}
    unmatched: list[str] = []
    # A layer that the file has under two names would be changed twice.
    taken: dict[tuple[object, ...], str] = {}
    twice: list[tuple[str, str]] = []
    for name in names:
        stem, role = _split_role(name)
        if known.is_not_needed(stem):
            continue
        target = known.find(stem)
        if not role or target is None:
            unmatched.append(name)
            continue
        if (other := taken.setdefault((target.part, target.layer, target.rows, role), name)) != name:
            twice.append((other, name))
        modules.setdefault(stem, LoraModule(stem, target)).keys[role] = name
    if unmatched:
        # Modules that match CLIP do not make it a LoRA for FLUX.1: other models have CLIP, too.
        is_of_flux = any(module.target.part == "transformer" for module in modules.values())
        is_of_another = not is_of_flux or any(re.search(_OTHER_MODEL_KEYS, name) for name in unmatched)
        hint = "; is it for another model?" if is_of_another else ""
        what = f"match nothing in this model's {' or '.join(parts)}"
        raise ValueError(f"{source}: {len(unmatched)} of its {len(names)} keys {what}: {first_names(unmatched)}{hint}")
    if twice:
        raise ValueError(f"{source} gives the same weight twice: {' and '.join(twice[0])}")
    return list(modules.values())


def _refuse_unsupported(source: str, names: Sequence[str]) -> None:
    """Raise ValueError for a file that is not a LoRA or not supported."""
    for pattern, what in _UNSUPPORTED:
        if key := next((name for name in names if re.search(pattern, name)), None):
            raise ValueError(f"{source} is a LoRA that is not supported: {what} (its keys: {key})")
    if not any(_split_role(name)[1] not in ("", "set") for name in names):
        raise ValueError(f"{source} is not a LoRA: its keys are {first_names(names) or 'none'}")
    if key := next((name for name in names if re.search(_CONVERTED_CONTROL_KEYS, name)), None):
        what = (
            "it is a control LoRA of FLUX.1 (Canny or Depth) in another layout than Black Forest Labs' and diffusers'"
        )
        raise ValueError(f"{source} is a LoRA that is not supported: {what} (its keys: {key})")


def _split_role(name: str) -> tuple[str, str]:
    """Return the stem and the role of a key; the role is "" for an unknown key."""
    for role, ending in _ROLE_PATTERNS.items():
        if found := re.search(ending, name):
            return name[: found.start()], role
    return name, ""


class _KnownLayers:
    """The layers of a model's parts, by all their names in LoRA files."""

    def __init__(self, parts: Mapping[str, Shapes]) -> None:
        self._dotted = {part: dict(_layer_names(part, shapes)) for part, shapes in parts.items()}
        self._underscored = {
            part: {name.replace(".", "_"): target for name, target in names.items()}
            for part, names in self._dotted.items()
        }

    def find(self, stem: str) -> Target | None:
        """Return the target of the module with this stem; None if no layer has that name."""
        spellings = (stem, stem.removesuffix(".weight"), stem.removesuffix(".scale"))
        found = (
            self._tables(part)[table].get(name) for each in spellings for part, table, name in _candidate_keys(each)
        )
        return next((target for target in found if target), None)

    def is_not_needed(self, stem: str) -> bool:
        """Return whether a module is for a layer that FLUX.1 does not use."""
        return any(name in UNUSED_KEYS.get(part, ()) for part, _, name in _candidate_keys(stem))

    def _tables(self, part: str) -> tuple[Mapping[str, Target], Mapping[str, Target]]:
        return self._dotted.get(part, {}), self._underscored.get(part, {})


def _candidate_keys(stem: str) -> Iterator[tuple[str, int, str]]:
    """Yield the possible meanings of a stem: part, 0 for dots or 1 for underscores, and the layer's name."""
    plain = stem.removeprefix(PEFT_WRAPPER)
    for prefix, part in _DOTTED_PREFIXES.items():
        if plain.startswith(prefix):
            yield part, 0, plain.removeprefix(prefix)
    for part in ("transformer", "clip", "t5"):
        yield part, 0, plain
    for prefix, parts in _UNDERSCORED_PREFIXES.items():
        if plain.startswith(prefix):
            yield from ((part, 1, plain.removeprefix(prefix)) for part in parts)


def _layer_names(part: str, shapes: Shapes) -> Iterator[tuple[str, Target]]:
    """Yield each name, without prefix, of each layer with a weight, and its target."""
    layers = [name.rpartition(".")[0] for name in shapes if name.endswith((".weight", ".scale"))]
    for layer in layers:
        yield layer, Target(part, layer)
    if part != "transformer":
        return
    hidden_size = shapes["img_in.weight"][0]
    for rule in transformer_rules(shapes):
        layer, _, kind = rule.original.rpartition(".")
        if kind == "bias" or rule.original not in shapes:
            continue
        bounds = [*(hidden_size * index for index in range(len(rule.diffusers))), shapes[rule.original][0]]
        is_fused = len(rule.diffusers) > 1
        pieces = tuple(end - start for start, end in pairwise(bounds)) if is_fused else ()
        yield layer, Target(part, layer, pieces=pieces)
        yield _renamed(layer, _DIFFSYNTH_NAMES), Target(part, layer, swaps_halves=rule.swaps_halves, pieces=pieces)
        if (name := _renamed(layer, _XLABS_NAMES)) != layer:
            yield name, Target(part, layer)
        if layer.endswith(".linear1"):
            yield layer.replace(".linear1", ".processor.qkv_lora"), Target(part, layer, (0, 3 * hidden_size))
        for number, (name, rows) in enumerate(zip(rule.diffusers, pairwise(bounds), strict=True)):
            yield name.rpartition(".")[0], Target(part, layer, rows if is_fused else None, rule.swaps_halves)
            if is_fused:
                yield f"{layer}.{number}", Target(part, layer, rows)
    yield "img_in.proj", Target(part, "img_in")


def _renamed(layer: str, names: Mapping[str, str]) -> str:
    """Return a layer's name with our words replaced, by `names` (our word -> theirs)."""
    for ours, theirs in names.items():
        layer = layer.replace(ours, theirs)
    return layer
