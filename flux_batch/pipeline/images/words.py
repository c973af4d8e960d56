"""The image arguments of a call, as a pipeline reads the words of diffusers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from flux_batch.model.conditions.variant import Variant
from flux_batch.pipeline.images.controls import ControlNets
from flux_batch.pipeline.images.prompts import ImagePrompts


def as_read(
    given: dict[str, Any],
    named: dict[str, Any],
    aliases: Collection[str],
    variant: Variant,
    controlnets: ControlNets,
    prompts: ImagePrompts,
) -> dict[str, Any]:
    """Return the image arguments of a call, those in other words too.

    given: by our names. named: arguments in the words `aliases`, by our names; those of images are taken out.
    """
    given = given | {name: named.pop(name) for name in given if name in named}
    if "image" in aliases and "reference_image" in variant.reads:  # as the pipelines of diffusers for it call it
        image = given["input_image"]
        if given["mask_image"] is None:
            given |= {"input_image": None, "reference_image": image}
        elif given["reference_image"] is None:  # what is repainted is edited, too
            given["reference_image"] = image
    if "ip_adapter_image" in aliases:
        given["image_prompt"] = prompts.as_diffusers(given["image_prompt"])
    given["control_image"] = controlnets.as_diffusers(given["control_image"])
    return given
