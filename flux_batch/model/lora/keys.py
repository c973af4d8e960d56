"""What the keys of a LoRA file mean: which rows of which weight each changes, whoever trained it; knows no tensor.

A LoRA's module is a group of keys with one stem (`...img_attn.qkv`) and endings that tell their roles
(`.lora_A.weight`). The vocabularies of stems are the original one (kohya's sd-scripts with underscores, ComfyUI with
dots), that of diffusers (PEFT, ai-toolkit; OneTrainer and LyCORIS with underscores), of XLabs-AI/x-flux 1da87eb
(src/flux/modules/layers.py), of modelscope/DiffSynth-Studio 0426080 (diffsynth/models/flux_dit.py), and of OMI: the
original one with numbered pieces (Nerogar/OneTrainer a44be32, modules/util/convert/lora/convert_flux_lora.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from flux_batch.model.checkpoint.checkpoint import listing
from flux_batch.model.checkpoint.detect import NOT_NEEDED, PREFIXES
from flux_batch.model.checkpoint.diffusers_keys import transformer_rules
from flux_batch.model.params import Shapes

# What stands before a stem, and the part it is of; "" of them all, as their names have nothing in common.
DOTTED = {
    **PREFIXES,
    "pipe.dit.": "transformer",
    "transformer.": "transformer",
    "text_encoder.text_model.": "clip",
    "text_encoder.": "clip",
    "text_encoder_2.": "t5",
    # What OneTrainer calls OMI's.
    "clip_l.text_model.": "clip",
    "clip_l.": "clip",
    "t5.": "t5",
}
UNDERSCORED = {
    "lora_unet_": ("transformer",),
    "lora_transformer_": ("transformer",),
    "lycoris_": ("transformer",),
    # Numbered as the trainer likes: CLIP is te or te1, T5 is te2 (OneTrainer) or te3 (kohya).
    **{f"lora_te{number}_{model}": ("clip", "t5") for number in ("", 1, 2, 3) for model in ("text_model_", "")},
}
PEFT_WRAPPER = "base_model.model."

# Adapters of PEFT have a name, which older files hold: lora_A.default.weight.
NAMED = r"(?:\.default|\.[\w-]+(?=\.(?:weight|bias)$))?"
ROLES = {
    "down": rf"\.lora_(?:down|A){NAMED}(?:\.weight)?$|\.(?:lora\.|lora_linear_layer\.)?down\.weight$",
    "up": rf"\.lora_(?:up|B){NAMED}(?:\.weight)?$|\.(?:lora\.|lora_linear_layer\.)?up\.weight$",
    "bias": rf"\.lora_(?:up|B){NAMED}\.bias$",
    "alpha": r"\.alpha$",
    "magnitude": rf"\.dora_scale$|\.lora_magnitude_vector{NAMED}(?:\.weight)?$",
    **{name: rf"\.{name}$" for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    **{name: rf"\.{name}$" for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")},
    "diff": r"\.(?:diff|w_norm)$",
    "diff_b": r"\.(?:diff_b|b_norm)$",
}
# What is not supported, by keys that nothing else has.
FOREIGN = (
    (r"\.(oft_blocks|oft_diag|oft_R|boft_[RS])\b", "it is of the kind OFT"),
    (r"\.[ab][12]\.weight$", "it is of the kind GLoRA"),
    (r"\.(lora_mid|hada_t[12]|lokr_t[12])\b", "it is made for convolutions, and FLUX.1 has none"),
    (r"^bundle_emb\.|^emb_params$|^string_to_param\b", "it holds embeddings of new words (textual inversion)"),
)
# A LoRA that replaces norms, too (every full model has these keys as well).
CONTROL = r"(query_norm|key_norm)\.(scale|weight)$|\.norm_(added_)?[qk]\.weight$|\.reshape_weight$"
# Layers of models that are built like FLUX.1: FLUX.2, Chroma.
ANOTHER = r"double_stream_modulation|single_stream_modulation|distilled_guidance_layer|to_qkv_mlp_proj"

XLABS = {
    ".img_attn.qkv": ".processor.qkv_lora1",
    ".txt_attn.qkv": ".processor.qkv_lora2",
    ".img_attn.proj": ".processor.proj_lora1",
    ".txt_attn.proj": ".processor.proj_lora2",
    ".linear2": ".processor.proj_lora",
}
DIFFSYNTH = {
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
    """The rows of a layer that a LoRA's module changes.

    `layer`: its name in the part (transformer, clip, t5); `rows`: from and to, None for all; `swaps_halves`: the module
    counts them as (scale, shift) where ours are (shift, scale); `pieces`: how many of the rows are of each layer that
    diffusers has instead, if it has several.
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
    """Return what each module of a LoRA with these keys changes in a model with these parts, in order.

    Raises: ValueError naming what the file is instead, or the keys that match nothing.
    """
    names = sorted(names)
    refuse_foreign(source, names)
    known = KnownLayers(parts)
    modules: dict[str, LoraModule] = {}
    unmatched: list[str] = []
    # One layer under two names would be changed twice.
    taken: dict[tuple[object, ...], str] = {}
    twice: list[tuple[str, str]] = []
    for name in names:
        stem, role = split_role(name)
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
        # Other models have CLIP too, and blocks with the same names.
        is_of_flux = any(module.target.part == "transformer" for module in modules.values())
        is_of_another = not is_of_flux or any(re.search(ANOTHER, name) for name in unmatched)
        hint = "; is it for another model?" if is_of_another else ""
        what = f"match nothing in this model's {' or '.join(parts)}"
        raise ValueError(f"{source}: {len(unmatched)} of its {len(names)} keys {what}: {listing(unmatched)}{hint}")
    if twice:
        raise ValueError(f"{source} holds two of the same: {' and '.join(twice[0])}")
    return list(modules.values())


def refuse_foreign(source: str, names: Sequence[str]) -> None:
    """Raise ValueError naming what a file is, if it is no LoRA or known not to be supported."""
    for pattern, what in FOREIGN:
        if key := next((name for name in names if re.search(pattern, name)), None):
            raise ValueError(f"{source} is a LoRA that is not supported: {what} (its keys: {key})")
    if not any(split_role(name)[1] for name in names):
        raise ValueError(f"{source} is no LoRA: its keys are {listing(names) or 'none'}")
    if key := next((name for name in names if re.search(CONTROL, name)), None):
        what = "it is a control LoRA of FLUX.1 (Canny or Depth), which needs a control image"
        raise ValueError(f"{source} is a LoRA that is not supported: {what} (its keys: {key})")


def split_role(name: str) -> tuple[str, str]:
    """Return a key's stem and role; the role is "" if the key is none of a LoRA's."""
    for role, ending in ROLES.items():
        if found := re.search(ending, name):
            return name[: found.start()], role
    return name, ""


class KnownLayers:
    """The layers of a model's parts under all names that LoRAs have for them."""

    def __init__(self, parts: Mapping[str, Shapes]) -> None:
        self._dotted = {part: dict(layer_names(part, shapes)) for part, shapes in parts.items()}
        self._underscored = {
            part: {name.replace(".", "_"): target for name, target in names.items()}
            for part, names in self._dotted.items()
        }

    def find(self, stem: str) -> Target | None:
        """Return what the module of that stem changes; None if it is nothing that is known."""
        spellings = (stem, stem.removesuffix(".weight"), stem.removesuffix(".scale"))
        found = (self._tables(part)[table].get(name) for each in spellings for part, table, name in readings(each))
        return next((target for target in found if target), None)

    def is_not_needed(self, stem: str) -> bool:
        """Tell whether a module is of something that trainers see, and FLUX.1 does not compute."""
        return any(name in NOT_NEEDED.get(part, ()) for part, _, name in readings(stem))

    def _tables(self, part: str) -> tuple[Mapping[str, Target], Mapping[str, Target]]:
        return self._dotted.get(part, {}), self._underscored.get(part, {})


def readings(stem: str) -> Iterator[tuple[str, int, str]]:
    """Yield the ways to read a stem: the part, whether its dots (0) are underscores (1), and the layer's name."""
    plain = stem.removeprefix(PEFT_WRAPPER)
    for prefix, part in DOTTED.items():
        if plain.startswith(prefix):
            yield part, 0, plain.removeprefix(prefix)
    for part in ("transformer", "clip", "t5"):
        yield part, 0, plain
    for prefix, parts in UNDERSCORED.items():
        if plain.startswith(prefix):
            yield from ((part, 1, plain.removeprefix(prefix)) for part in parts)


def layer_names(part: str, shapes: Shapes) -> Iterator[tuple[str, Target]]:
    """Yield every name of every layer with a weight, without prefix, and what it stands for."""
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
        yield renamed(layer, DIFFSYNTH), Target(part, layer, swaps_halves=rule.swaps_halves, pieces=pieces)
        if (name := renamed(layer, XLABS)) != layer:
            yield name, Target(part, layer)
        if layer.endswith(".linear1"):
            yield layer.replace(".linear1", ".processor.qkv_lora"), Target(part, layer, (0, 3 * hidden_size))
        for number, (name, rows) in enumerate(zip(rule.diffusers, pairwise(bounds), strict=True)):
            yield name.rpartition(".")[0], Target(part, layer, rows if is_fused else None, rule.swaps_halves)
            if is_fused:
                yield f"{layer}.{number}", Target(part, layer, rows)
    yield "img_in.proj", Target(part, "img_in")


def renamed(layer: str, names: Mapping[str, str]) -> str:
    """Return a layer's name with each of our words in it replaced by theirs."""
    for ours, theirs in names.items():
        layer = layer.replace(ours, theirs)
    return layer
