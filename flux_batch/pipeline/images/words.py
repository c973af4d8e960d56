"""The translation of diffusers' image arguments into those of this pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flux_batch.errors import InvalidSetting
from flux_batch.model.conditions.variant import Variant
from flux_batch.pipeline.images.controls import ControlNets
from flux_batch.pipeline.images.prompts import ImagePrompts


def as_read(
    given: dict[str, Any],
    named: dict[str, Any],
    aliases: Mapping[str, Any],
    variant: Variant,
    controlnets: ControlNets,
    prompts: ImagePrompts,
) -> dict[str, Any]:
    """Return the image arguments of a call, including those with diffusers' names.

    given: the arguments under our names. named: the values of `aliases` under our names; image arguments are removed
    from it. Raises: InvalidSetting for a reference image that is given twice.
    """
    given = given | {name: named.pop(name) for name in given if name in named}
    # The Kontext pipelines of diffusers call a reference image `image`.
    if aliases.get("image") is not None and "reference_image" in variant.reads:
        image = given["input_image"]
        if given["mask_image"] is None:
            if given["reference_image"] is not None and given["reference_image"] is not image:
                raise InvalidSetting("image: reference_image is given twice, leave one of them out", field="image")
            given |= {"input_image": None, "reference_image": image}
        elif given["reference_image"] is None:  # the image to repaint is also the reference
            given["reference_image"] = image
    if aliases.get("ip_adapter_image") is not None:
        given["image_prompt"] = prompts.as_diffusers(given["image_prompt"])
    given["control_image"] = controlnets.as_diffusers(given["control_image"])
    return given
