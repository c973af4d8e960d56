"""The variants of FLUX.1: what each reads beside the text, and its guidance.

The channels of an image token tell text-to-image, Fill, and the two of Canny and Depth; Kontext and Krea
have those of text-to-image. Among variants of the same channels only a name tells.
Guidance is that of black-forest-labs/flux 802fb47 (src/flux/cli_fill.py, cli_control.py, cli_kontext.py), where most
pipelines of diffusers have 3.5 in their signatures.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from flux_batch.model.params import FluxParams


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A variant of FLUX.1.

    channels: those of a token's input, counted in those of its noise. needs: the arguments of images that every call
    needs; reads: those that a call may have beside them. guidance: that of a call without one.
    """

    title: str
    channels: int = 1
    guidance: float = 3.5
    needs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ("input_image", "mask_image")


VariantName = Literal["auto", "dev", "schnell", "krea", "kontext", "fill", "canny", "depth"]
VARIANT_NAMES: tuple[str, ...] = get_args(VariantName)
TEXT_TO_IMAGE = Variant(title="FLUX.1")
# The guidance of the examples in its model card and in diffusers; BFL's code has one for all of text-to-image.
KREA = Variant(title="FLUX.1-Krea", guidance=4.5)
KONTEXT = Variant(title="FLUX.1-Kontext", guidance=2.5, reads=("input_image", "mask_image", "reference_image"))
FILL = Variant(title="FLUX.1-Fill", channels=6, guidance=30.0, needs=("input_image", "mask_image"))
_CONTROL = ("control_image",)
CANNY = Variant(title="FLUX.1-Canny", channels=2, guidance=30.0, needs=_CONTROL)
DEPTH = Variant(title="FLUX.1-Depth", channels=2, guidance=10.0, needs=_CONTROL)
# In the order in which names are looked for: a Kontext and a Krea are called dev, too.
_BY_NAME = {
    "kontext": KONTEXT,
    "krea": KREA,
    "dev": TEXT_TO_IMAGE,
    "schnell": TEXT_TO_IMAGE,
    "fill": FILL,
    "canny": CANNY,
    "depth": DEPTH,
}
UNTOLD = Variant(title="FLUX.1-Canny or -Depth", channels=2, guidance=30.0, needs=_CONTROL)

# Parts at the end of a path that may name a model: models--owner--NAME/snapshots/hash/transformer/file.
_NAMING_PARTS = 5


def names_in(path: str) -> list[str]:
    """Return the names in a path or address that may tell a variant: the file, then its folders."""
    return path.rstrip("/").split("/")[: -_NAMING_PARTS - 1 : -1]


def is_kontext(name: str, hints: Iterable[str]) -> bool:
    """Return whether a model is a Kontext: it is said to be one, or named so."""
    return name == "kontext" or (
        name == "auto" and any(re.search("flux.*kontext", hint, re.IGNORECASE) for hint in hints)
    )


def variant_of(params: FluxParams, name: str = "auto", hints: Iterable[str] = ()) -> Variant:
    """Return the variant of a transformer.

    name: the one that it is said to be. hints: names of its file, folder and repository, the nearest first, which tell
    variants of the same channels apart: flux1-depth-dev.safetensors.
    Raises: ValueError for channels that no variant has, or not the named one.
    """
    times, rest = divmod(params.in_channels, params.out_channels)
    known = {each: variant for each, variant in _BY_NAME.items() if variant.channels == times and not rest}
    if not known:
        raise ValueError(
            f"img_in takes {params.in_channels} channels where text-to-image takes {params.out_channels}: this is an "
            "unknown variant, which is not supported"
        )
    if name != "auto":
        if name not in known:
            raise ValueError(f"it is said to be the variant {name}, but by its channels it is {' or '.join(known)}")
        return known[name]
    told = (known[each] for hint in hints for each in known if re.search(f"flux.*{each}", hint, re.IGNORECASE))
    return next(told, TEXT_TO_IMAGE if times == 1 else FILL if times == FILL.channels else UNTOLD)
