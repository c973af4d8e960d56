"""The variants of FLUX.1: what each reads beside the text, and its guidance.

The number of channels of an image token distinguishes text-to-image, Fill, and Canny or Depth. Kontext and Krea have
as many as text-to-image. Variants with the same channels are distinguished by the model's name.
Guidance is that of black-forest-labs/flux 802fb47 (src/flux/cli_fill.py, cli_control.py, cli_kontext.py); most
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

    channels: the input channels of a token, as a multiple of its noisy channels. needs: the image arguments that every
    call must have; reads: the image arguments that a call may have. guidance: the default of a call.
    """

    title: str
    channels: int = 1
    guidance: float = 3.5
    needs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ("input_image", "mask_image")


VariantName = Literal["auto", "dev", "schnell", "krea", "kontext", "fill", "canny", "depth"]
VARIANT_NAMES: tuple[str, ...] = get_args(VariantName)
TEXT_TO_IMAGE = Variant(title="FLUX.1")
# The guidance in the examples of its model card and of diffusers; BFL's code has 3.5 for all text-to-image models.
KREA = Variant(title="FLUX.1-Krea", guidance=4.5)
KONTEXT = Variant(title="FLUX.1-Kontext", guidance=2.5, reads=("input_image", "mask_image", "reference_image"))
FILL = Variant(title="FLUX.1-Fill", channels=6, guidance=30.0, needs=("input_image", "mask_image"))
_CONTROL = ("control_image",)
CANNY = Variant(title="FLUX.1-Canny", channels=2, guidance=30.0, needs=_CONTROL)
DEPTH = Variant(title="FLUX.1-Depth", channels=2, guidance=10.0, needs=_CONTROL)
# In the order of the search: the names of Kontext and Krea models contain "dev", too.
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

# The number of last parts of a path that may name the model: models--owner--NAME/snapshots/hash/transformer/file.
_NAMING_PARTS = 5


def names_in(path: str) -> list[str]:
    """Return the names in a path or address that may name a variant: the file, then its folders."""
    return path.rstrip("/").split("/")[: -_NAMING_PARTS - 1 : -1]


def is_kontext(name: str, hints: Iterable[str]) -> bool:
    """Return whether a model is a Kontext, by the given name or by its path."""
    return name == "kontext" or (
        name == "auto" and any(re.search("flux.*kontext", hint, re.IGNORECASE) for hint in hints)
    )


def variant_of(params: FluxParams, name: str = "auto", hints: Iterable[str] = ()) -> Variant:
    """Return the variant of a transformer.

    name: the variant that the user has given. hints: names of its file, folder and repository, the nearest first, which
    distinguish variants with the same channels: flux1-depth-dev.safetensors.
    Raises: ValueError for channels that no variant has, or that the given variant does not have.
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
            raise ValueError(f"the variant {name} was given, but by its channels it is {' or '.join(known)}")
        return known[name]
    told = (known[each] for hint in hints for each in known if re.search(f"flux.*{each}", hint, re.IGNORECASE))
    return next(told, TEXT_TO_IMAGE if times == 1 else FILL if times == FILL.channels else UNTOLD)
