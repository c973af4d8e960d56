"""The input images of a call, checked: a list for each argument, with one entry for each image to make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from PIL import Image
from torch import Tensor

from flux_batch.errors import InvalidSetting, RowError, count_of
from flux_batch.images import check_proportions
from flux_batch.model.conditions.variant import FILL, Variant
from flux_batch.pipeline.images.pixels import resized
from flux_batch.sampling_params import MAX_SIDE, check_number, own_size, preferred_size


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageInputs:
    """The input images of a call; None for an argument that is not given.

    mask_image: white is repainted. control_image: each entry is a list. reference_image: each entry is a list, already
    resized to the size that the model reads. image_prompt: each entry is a list, all of equal length.
    image_prompt_embeds: replaces image_prompt, one tensor (b, k, e) for each IP-Adapter. control_image_scale,
    image_prompt_scale: the weight of each of these images. Raises: InvalidSetting for a mask without its image or with
    other proportions, or if not all images have references of the same sizes.
    """

    input_image: list[Image.Image] | None = None
    mask_image: list[Image.Image] | None = None
    control_image: list[list[Image.Image]] | None = None
    reference_image: list[list[Image.Image]] | None = None
    image_prompt: list[list[Image.Image]] | None = None
    image_prompt_embeds: list[Tensor] | None = None
    control_image_scale: list[list[float]] | None = None
    image_prompt_scale: list[list[float]] | None = None

    def __post_init__(self) -> None:
        if len({len(images) for images in self.image_prompt or ()}) > 1:
            raise InvalidSetting(
                "image_prompt: the images of one call must have the same number; make others in calls of their own",
                field="image_prompt",
            )
        for images in self.reference_image or ():
            if (sizes := tuple(image.size for image in images)) != self.reference_sizes:
                raise InvalidSetting(
                    f"reference_image: of the sizes {sizes} and {self.reference_sizes}: the images of one call must "
                    "have references of the same number and sizes; make them in calls of their own",
                    field="reference_image",
                )
        if self.mask_image is None:
            return
        controls = (
            None if self.control_image is None else [images[0] if images else None for images in self.control_image]
        )
        repainted = self.input_image or controls
        if repainted is None:
            raise InvalidSetting(_NO_IMAGE_FOR_MASK, field="mask_image")
        for mask, image in zip(self.mask_image, repainted, strict=True):
            if isinstance(mask, Image.Image) and isinstance(image, Image.Image):
                try:
                    check_proportions(mask.size, image.size)
                except RowError as error:
                    raise InvalidSetting(f"mask_image {error}", field="mask_image") from error

    @property
    def num_controls(self) -> int:
        """The number of control images of the first image to make, 0 without any."""
        return len(self.control_image[0]) if self.control_image else 0

    @property
    def reference_sizes(self) -> tuple[tuple[int, int], ...]:
        """The width and height of each reference image; they are equal for all images to make."""
        return tuple(image.size for image in self.reference_image[0]) if self.reference_image else ()

    def size_of(self, width: int | None, height: int | None) -> tuple[int, int]:
        """Return the width and height of the images to make: as given, else the first reference's, else the default."""
        default = next(iter(self.reference_sizes), (_DEFAULT_SIDE, _DEFAULT_SIDE))
        return default[0] if width is None else width, default[1] if height is None else height

    @property
    def prompt_scales(self) -> list[list[float]]:
        """The weights of the image prompts of each image to make."""
        return self.image_prompt_scale or [[1.0] * len(images) for images in self.image_prompt or ()]

    def control_weights(self, place: int) -> list[float]:
        """Return the weights of the control images at an index of each image's list."""
        return [each[place] for each in self.control_image_scale or ()]

    def check_for(self, variant: Variant, *, nets_read_mask: bool = False) -> None:
        """Raise InvalidSetting for images that a variant of the model lacks or does not read.

        nets_read_mask: a ControlNet reads the mask, with or without an input_image.
        """
        needs = " and ".join(variant.needs)
        for name in variant.needs:
            if getattr(self, name) is None:
                raise InvalidSetting(f"{name} is missing: {variant.title} needs {needs}", field=name)
        for name in _IMAGES:
            if getattr(self, name) is not None and name not in {*variant.needs, *variant.reads, *_PROMPTS}:
                raise InvalidSetting(f"{name}: {variant.title} reads none; leave it out", field=name)
        if self.mask_image is not None and self.input_image is None and not nets_read_mask:
            raise InvalidSetting(_NO_IMAGE_FOR_MASK, field="mask_image")
        for images in (self.control_image or ()) if variant.channels == 2 else ():
            if len(images) != 1:
                raise InvalidSetting(
                    f"control_image: {len(images)} images, where {variant.title} reads one", field="control_image"
                )
        if variant.channels == 2 and any(weight != 1 for weight in self.control_weights(0)):
            raise InvalidSetting(
                f"control_image_scale: {variant.title} reads a control image as it is; leave the weight out",
                field="control_image_scale",
            )


class SharedImages(list[Any]):
    """Input images that all images of a call share, whatever their number."""


def shared_by_all(value: Any, num_readers: int) -> Any:
    """Return a list as SharedImages if it has one entry for each reader."""
    return SharedImages(value) if isinstance(value, (list, tuple)) and len(value) == num_readers else value


_NO_IMAGE_FOR_MASK = "mask_image: needs an input_image to repaint"
# Arguments with several input images for an image to make.
_SEVERAL = ("control_image", "reference_image", "image_prompt")
# Arguments with image prompts, which no variant of the model reads by itself.
_PROMPTS = ("image_prompt", "image_prompt_embeds")
# Arguments whose images have weights.
_WEIGHTED = ("control_image", "image_prompt")
_DEFAULT_SIDE = 1024  # pixels
_IMAGES = tuple(field.name for field in fields(ImageInputs) if not field.name.endswith("_scale"))


def keeps_latents(inputs: ImageInputs, variant: Variant) -> bool:
    """Return whether the area outside a mask is restored after each step: not for Fill, which reads the mask."""
    return inputs.mask_image is not None and variant is not FILL


def image_inputs(
    count: int, arguments: dict[str, Any], resize_references: bool = True, *, is_single: bool = False
) -> ImageInputs:
    """Return the input images of a call that makes `count` images.

    is_single: a list holds several input images of the one image to make. Raises: InvalidSetting.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    scales = {name: given.pop(f"{name}_scale", 1.0) for name in _WEIGHTED}
    embeds = given.pop("image_prompt_embeds", None)
    for name, value in given.items():
        is_list = is_single and name in _SEVERAL and isinstance(value, (list, tuple))
        given[name] = _one_each(name, [value] if is_list else value, count)
    for name in _SEVERAL:
        if name in given:
            given[name] = [_flat(as_images(each)) for each in given[name]]
    if "reference_image" in given:
        size_of = preferred_size if resize_references else own_size
        given["reference_image"] = [[_sized(each, size_of) for each in images] for images in given["reference_image"]]
    if not any(given.get("image_prompt", ())):
        given.pop("image_prompt", None)
    for name in _WEIGHTED:
        if name in given:
            given[f"{name}_scale"] = _scales(name, scales[name], given[name], is_single=is_single)
    if embeds is not None:
        given["image_prompt_embeds"] = _prompt_embeds(embeds, count, scales["image_prompt"])
    return ImageInputs(**given)


def _prompt_embeds(value: Any, count: int, scale: Any) -> list[Tensor]:
    """Return embeddings of image prompts: for each IP-Adapter (count, k, e). Raises: InvalidSetting."""
    name = "ip_adapter_image_embeds"
    if scale != 1.0:
        raise InvalidSetting(f"image_prompt_scale: is a weight of images, and {name} are none", field=name)
    found = []
    for each in as_images(value):
        if not isinstance(each, Tensor) or each.ndim != 3 or each.shape[0] not in (1, count):
            got = list(each.shape) if isinstance(each, Tensor) else f"a {type(each).__name__}"
            raise InvalidSetting(
                f"{name} is {got}: must be a tensor for each IP-Adapter, (1, k, e) or ({count}, k, e), of k images and "
                "the width e of CLIP's embedding",
                field=name,
            )
        found.append(each.expand(count, -1, -1))
    return found


def _scales(field: str, value: Any, images: Sequence[Sequence[Any]], *, is_single: bool) -> list[list[float]]:
    """Return the weights of an argument's input images, a list for each image to make. Raises: InvalidSetting."""
    name, found = f"{field}_scale", []
    for own, prompts in zip(_one_each(name, [value] if is_single else value, len(images)), images, strict=True):
        scales = list(own) if isinstance(own, (list, tuple)) else [own] * len(prompts)
        for scale in scales:
            check_number(name, scale)
        if len(scales) != len(prompts):
            raise InvalidSetting(
                f"{name}: {len(scales)} weights for {count_of(len(prompts), 'image')} in {field}", field=name
            )
        found.append(scales)
    return found


def _sized(image: Any, size_of: Callable[[int, int], tuple[int, int]]) -> Image.Image:
    """Return a reference image in RGB, resized to the size that the model reads. Raises: InvalidSetting."""
    if not isinstance(image, Image.Image):
        raise InvalidSetting(
            f"reference_image is a {type(image).__name__}: must be a PIL image", field="reference_image"
        )
    size = size_of(*image.size)
    if max(size) > MAX_SIDE:
        raise InvalidSetting(f"reference_image is {image.size}: a side may have {MAX_SIDE}", field="reference_image")
    return resized(image, *size, "reference_image")


def _flat(images: list[Any]) -> list[Any]:
    """Return a flat list: diffusers accepts a list for each IP-Adapter inside the list."""
    return as_images(images[0]) if len(images) == 1 else images


def as_images(value: Any) -> list[Any]:
    """Return an image or several images as a list."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _one_each(name: str, value: Any, count: int) -> list[Any]:
    """Return one value for each image; a list of one value is for all, as in diffusers.

    Raises: InvalidSetting for another length.
    """
    if isinstance(value, SharedImages):
        return [value] * count
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    values = values * count if len(values) == 1 else values
    if len(values) != count:
        raise InvalidSetting(f"{name}: {len(values)} values for {count} prompts; give one, or one each", field=name)
    return values
