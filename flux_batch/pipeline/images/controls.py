"""The ControlNets of a pipeline: the settings of a call for each, and the images that each reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from flux_batch.errors import InvalidSetting
from flux_batch.model.conditions.controlnet import ControlNet, ControlUse
from flux_batch.model.conditions.variant import Variant
from flux_batch.model.sampling import HOST
from flux_batch.pipeline.images.inputs import SharedImages, shared_by_all
from flux_batch.sampling_params import check_integer, check_number

if TYPE_CHECKING:
    from flux_batch.pipeline.images.latents import ImageLatents
    from flux_batch.pipeline.request import PipelineRequest


class ControlSetting(NamedTuple):
    """The settings of one control image, as in diffusers.

    scale: the strength of its net; 0 switches it off. start, end: the net is active at step i of n if i / n >= start
    and (i + 1) / n <= end. mode: the kind of image, for a union net only: 0 canny, 1 tile, 2 depth, 3 blur, 4 pose,
    5 grey, 6 low quality. The residuals of each net are mapped to the blocks of the model before the nets are summed;
    diffusers sums first.
    """

    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mode: int | None = None


# The arguments of a call, with the names of diffusers, in the order of ControlSetting.
CONTROL_ARGUMENTS = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end", "control_mode")
_DEFAULTS = (1.0, 0.0, 1.0, None)


# DiffSynth-Studio's names for the modes of a union net (modelscope/DiffSynth-Studio, models/flux_controlnet.py).
_DIFFSYNTH_MODES = {"canny": 0, "tile": 1, "depth": 2, "blur": 3, "pose": 4, "gray": 5, "lq": 6}


def controls_of_diffsynth(inputs: Sequence[Any]) -> dict[str, Any]:
    """Return arguments of a call for DiffSynth-Studio's `controlnet_inputs`.

    inputs: objects or mappings with the fields image, inpaint_mask, controlnet_id, scale, processor_id, start and end.
    start and end are the shares of the steps that remain when the net begins and ends (defaults 1 and 0); they are
    converted to diffusers' shares and rounded like these. Raises: InvalidSetting.
    """
    given = _all_fields(inputs)
    if not given:
        return {}
    nets = [each.get("controlnet_id", 0) for each in given]
    if sorted(nets) != list(range(len(nets))) and set(nets) != {0}:
        raise InvalidSetting(
            f"controlnet_inputs: controlnet_id = {nets}: give one input for each net, or several for a single net",
            field="controlnet_inputs",
        )
    given = [each for _, each in sorted(zip(nets, given, strict=True), key=itemgetter(0))]
    found: dict[str, Any] = {"control_image": SharedImages(each.get("image") for each in given)}
    found["controls"] = (
        [each.get("scale", 1.0) for each in given],
        [1.0 - each.get("start", 1.0) for each in given],
        [1.0 - each.get("end", 0.0) for each in given],
        [_DIFFSYNTH_MODES.get(each.get("processor_id")) for each in given],
    )
    masks = [mask for each in given if (mask := each.get("inpaint_mask")) is not None]
    return found | ({"mask_image": masks[0]} if masks else {})


def _all_fields(inputs: Any) -> list[_Fields]:
    """Return the fields of each input. Raises: InvalidSetting for an input without fields."""
    name = "controlnet_inputs"
    if not isinstance(inputs, (list, tuple)):
        raise InvalidSetting(f"{name} is a {type(inputs).__name__}: must be a list of inputs", field=name)
    for each in inputs:
        if not isinstance(each, Mapping) and not hasattr(each, "__dict__"):
            what = f"{name} holds a {type(each).__name__}"
            raise InvalidSetting(f"{what}: must hold objects or mappings with the field image", field=name)
    return [_Fields(each) for each in inputs]


class _Fields:
    """The fields of an object or a mapping, without those that are None."""

    def __init__(self, source: Any) -> None:
        self._values = source if isinstance(source, Mapping) else vars(source)

    def get(self, name: str, default: Any = None) -> Any:
        value = self._values.get(name)
        return default if value is None else value


class ControlNets:
    """The ControlNets of a pipeline: none, one or several.

    Each of several nets reads one control image. A single net reads all control images, one after the other.
    """

    def __init__(self, nets: Sequence[ControlNet] = ()) -> None:
        self.nets = tuple(nets)

    def as_diffusers(self, images: Any) -> Any:
        """Return control images as diffusers reads them.

        A flat list with one image for each of several nets is shared by all prompts.
        """
        is_flat = isinstance(images, (list, tuple)) and not any(isinstance(each, (list, tuple)) for each in images)
        return shared_by_all(images, len(self.nets)) if is_flat and len(self.nets) > 1 else images

    def settings(self, num_images: int, *arguments: Any) -> tuple[ControlSetting, ...]:
        """Return the settings of an image's `num_images` control images; 0 stands for one for each net.

        arguments: those of a call, each one value for all or a list. Raises: InvalidSetting for a value out of range,
        if the number of values is not the number of images, or the number of images not that of the nets; and for any
        value without nets.
        """
        if not self.nets:
            _check_unset(arguments)
            return ()
        count = num_images or len(self.nets)
        if len(self.nets) not in (1, count):
            raise InvalidSetting(
                f"control_image: {count} images, where the model has {len(self.nets)} ControlNets; give one for each",
                field="control_image",
            )
        lists = [_one_each(name, value, count) for name, value in zip(CONTROL_ARGUMENTS, arguments, strict=True)]
        found = tuple(ControlSetting(*values) for values in zip(*lists, strict=True))
        for number, setting in enumerate(found, start=1):
            _check_range(number, setting)
        return found

    def check_modes(self, settings: Sequence[ControlSetting]) -> None:
        """Raise InvalidSetting unless each union net has its mode, and no other net has one."""
        for number, (net, setting) in enumerate(zip(self._net_of_each(len(settings)), settings, strict=True), start=1):
            _check_mode(number, net.controlnet_params.num_modes, setting.mode)

    def check(self, request: PipelineRequest, variant: Variant) -> None:
        """Raise InvalidSetting unless a call has the images that the model and the nets read."""
        images, settings = request.images, request.controls
        counts_any = any(each.scale for each in settings)
        if not self.nets:
            images.check_for(variant)
            return
        if "control_image" in variant.needs:
            raise InvalidSetting(
                f"control_image: {variant.title} reads it in its channels, and ControlNets read one as well; use one "
                "of the two",
                field="control_image",
            )
        with_nets = replace(
            variant,
            title=f"{variant.title} with ControlNets",
            needs=(*variant.needs, *(["control_image"] if counts_any else [])),
            reads=(*variant.reads, "control_image"),
        )
        images.check_for(with_nets, nets_read_mask=any(net.controlnet_params.reads_mask for net in self.nets))
        if not counts_any or images.control_image is None:
            return
        if images.reference_image is not None:
            raise InvalidSetting(
                "reference_image: ControlNets do not go with reference images; leave one of them out",
                field="reference_image",
            )
        if any(len(each) != len(settings) for each in images.control_image):
            counts = sorted({len(each) for each in images.control_image})
            raise InvalidSetting(
                f"control_image: {' and '.join(map(str, counts))} images; each image of a call needs {len(settings)}",
                field="control_image",
            )
        self.check_modes(settings)
        readers = [net.controlnet_params.reads_mask for net in self._net_of_each(len(settings))]
        if images.mask_image is None and any(
            reads and setting.scale for reads, setting in zip(readers, settings, strict=True)
        ):
            raise InvalidSetting(
                "mask_image is missing: a ControlNet for inpainting needs it, white where it repaints",
                field="mask_image",
            )

    def uses(self, request: PipelineRequest, latents: ImageLatents) -> list[ControlUse]:
        """Return the nets that are used in a call, each with its encoded control images."""
        nets = self._net_of_each(len(request.controls))
        return [
            self._use(net, setting, request, place, latents)
            for place, (net, setting) in enumerate(zip(nets, request.controls, strict=True))
            if setting.scale
        ]

    def _use(
        self, net: ControlNet, setting: ControlSetting, request: PipelineRequest, place: int, latents: ImageLatents
    ) -> ControlUse:
        condition, weights = self._condition(net, request, place, latents), request.images.control_weights(place)
        if all(weight == 1 for weight in weights):
            return ControlUse(net, condition, *setting)
        return ControlUse(net, condition, *setting, torch.tensor(weights, **HOST)[:, None, None].to(condition))

    def _condition(self, net: ControlNet, request: PipelineRequest, place: int, latents: ImageLatents) -> Tensor:
        p = net.controlnet_params
        control = latents.control(request, place, as_pixels=p.reads_pixels, with_mask=p.reads_mask)
        return net.embed_condition(control)

    def _net_of_each(self, count: int) -> tuple[ControlNet, ...]:
        """Return the net of each control image of an image."""
        return self.nets * count if len(self.nets) == 1 else self.nets


def _check_range(number: int, setting: ControlSetting) -> None:
    """Raise InvalidSetting for a setting out of range."""
    scale, start, end, mode = setting
    check_number("controlnet_conditioning_scale", scale)
    check_number("control_guidance_start", start)
    check_number("control_guidance_end", end)
    if not 0 <= start < end <= 1:
        raise InvalidSetting(
            f"control_guidance_start = {start} and control_guidance_end = {end} of control image {number}: must be "
            "shares of the steps, from 0 to 1, the start before the end",
            field="control_guidance_start",
        )
    if mode is not None:
        check_integer("control_mode", mode, 0, 2**31)


def _check_mode(number: int, num_modes: int, mode: int | None) -> None:
    """Raise InvalidSetting unless a union net has a valid mode and other nets none."""
    if num_modes and (mode is None or mode >= num_modes):
        raise InvalidSetting(
            f"control_mode = {mode} of control image {number}: its union ControlNet needs one from 0 to "
            f"{num_modes - 1}: 0 canny, 1 tile, 2 depth, 3 blur, 4 pose, 5 grey, 6 low quality",
            field="control_mode",
        )
    if mode is not None and not num_modes:
        raise InvalidSetting(
            f"control_mode = {mode} of control image {number}: its ControlNet is not a union net and has no modes; "
            "leave it out",
            field="control_mode",
        )


def _check_unset(arguments: Sequence[Any]) -> None:
    """Raise InvalidSetting for an argument of ControlNets that is set although there are none."""
    for name, value, default in zip(CONTROL_ARGUMENTS, arguments, _DEFAULTS, strict=True):
        values = value if isinstance(value, (list, tuple)) else [value]
        if not all(each is default or (isinstance(each, Real) and each == default) for each in values):
            raise InvalidSetting(f"{name} = {value!r}: the model has no ControlNet; leave it out", field=name)


def _one_each(name: str, value: Any, count: int) -> list[Any]:
    """Return a value for each control image. Raises: InvalidSetting for a list of another length."""
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise InvalidSetting(
            f"{name}: {len(value)} values for {count} control images; give one, or one each", field=name
        )
    return list(value)
