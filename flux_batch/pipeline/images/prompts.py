"""The models that read the image prompts of a call: a FLUX.1-Redux, IP-Adapters, or neither."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from flux_batch.download.models import PathOrFolder
from flux_batch.errors import CheckpointError, InvalidSetting
from flux_batch.model.checkpoint.checkpoint import Checkpoint, open_checkpoint
from flux_batch.model.checkpoint.image_prompts import PROMPT_PART_TITLES, PromptPart, ip_adapter_files, redux_files
from flux_batch.model.params import FluxParams
from flux_batch.model.sampling import normal_tensor
from flux_batch.model.transformer import ImagePrompt, PromptEmbeds
from flux_batch.pipeline.errors import checkpoint_errors
from flux_batch.pipeline.images.inputs import ImageInputs, as_images, image_inputs, shared_by_all
from flux_batch.pipeline.images.ip_adapter import IPAdapterPrompts, ip_adapter_prompts, load_ip_adapter_prompts
from flux_batch.pipeline.images.redux import ReduxPrompts, load_redux_prompts, redux_prompts

# The guidance in BFL's code: black-forest-labs/flux 802fb47, src/flux/cli_redux.py.
REDUX_GUIDANCE = 2.5
# Model -> its vision tower.
_TOWERS: dict[PromptPart, PromptPart] = {"redux": "siglip", "ip_adapter": "clip_vision"}


# The strength of IP-Adapters: a number for all, a list for the double blocks of a single one, or an entry for each.
AdapterScale: TypeAlias = float | Sequence[float | Sequence[float]]


class ImagePrompts:
    """The models that read a pipeline's image prompts, for a transformer with these parameters.

    dtype, device: of the transformer; storage_options: for the addresses to load from.
    """

    def __init__(
        self, base: FluxParams, dtype: torch.dtype, device: torch.device, storage_options: Mapping[str, Any]
    ) -> None:
        self._base: dict[str, Any] = {"base": base, "dtype": dtype, "device": device}
        self._options = self._base | {"storage_options": storage_options}
        self.redux: ReduxPrompts | None = None
        self.ip_adapters: list[IPAdapterPrompts] = []

    def load_redux(self, uri: PathOrFolder, image_encoder: PathOrFolder | None, scale: float) -> None:
        """Load a FLUX.1-Redux. Raises: the errors of `load_redux_prompts`; InvalidSetting beside an IP-Adapter."""
        _check_one_reader(self.ip_adapters)
        self.redux = load_redux_prompts(uri, image_encoder, scale, **self._options)

    def load_ip_adapters(
        self,
        uris: Sequence[PathOrFolder],
        image_encoder: PathOrFolder | None,
        scale: AdapterScale,
        subfolder: str | None = None,
    ) -> None:
        """Load IP-Adapters. Raises: the errors of `load_ip_adapter_prompts`; InvalidSetting if a Redux is loaded.

        subfolder: the folder of the image encoder in its repository.
        """
        _check_one_reader(self.redux)
        image_encoder = image_encoder and _file_in(image_encoder, subfolder)
        adapters = load_ip_adapter_prompts(uris, image_encoder, **self._options)
        _set_scales(adapters, scale)
        self.ip_adapters = adapters

    def load_found(self, found: Mapping[PromptPart, Sequence[Checkpoint]]) -> None:
        """Load the Redux or IP-Adapters among the files of a ModelManager, with their vision towers.

        A tower that is not among the files is read from the folder beside its model. Raises: CheckpointError, also for
        a tower without its model, or for two files where only one is used; InvalidSetting for both kinds of model.
        """
        for part, files in found.items():
            if part != "ip_adapter" and len(files) > 1:
                raise CheckpointError(
                    f"{files[0].source} and {files[1].source} are both {PROMPT_PART_TITLES[part]}: leave one of them "
                    "out of load_models([...])"
                )
        for part, own in _TOWERS.items():
            if own in found and part not in found:
                raise CheckpointError(
                    f"{found[own][-1].source} is {PROMPT_PART_TITLES[own]}, which is read for "
                    f"{PROMPT_PART_TITLES[part]}: add the file of that to load_models([...])"
                )
        if reduxes := found.get("redux"):
            redux = reduxes[-1]
            self.redux = redux_prompts(redux, _tower(found.get("siglip"), redux, redux_files), **self._base)
        if adapters := found.get("ip_adapter"):
            _check_one_reader(self.redux)
            towers = [_tower(found.get("clip_vision"), each, ip_adapter_files) for each in adapters]
            self.ip_adapters = ip_adapter_prompts(list(zip(adapters, towers, strict=True)), **self._base)

    def set_scale(self, scale: AdapterScale) -> None:
        """Set the strength of the IP-Adapters. Raises: InvalidSetting, also without an IP-Adapter."""
        if not self.ip_adapters:
            raise InvalidSetting("scale: there is no IP-Adapter; load_ip_adapter loads one", field="scale")
        _set_scales(self.ip_adapters, scale)

    def as_diffusers(self, images: Any) -> Any:
        """Return `ip_adapter_image` as diffusers reads it.

        A list with an entry for each IP-Adapter is shared by all prompts.
        """
        return shared_by_all(images, len(self.ip_adapters)) if self.ip_adapters else images

    def check(self, images: ImageInputs) -> None:
        """Raise InvalidSetting for image prompts, or embeddings of them, that the loaded models cannot read."""
        if images.image_prompt and not (self.redux or self.ip_adapters):
            raise InvalidSetting(
                "image_prompt: FLUX.1 reads none by itself: load a FLUX.1-Redux or an IP-Adapter beside it, "
                "model.redux or model.ip_adapter in a job",
                field="image_prompt",
            )
        if images.image_prompt and len(self.ip_adapters) > 1:
            _check_images_of_several(images.image_prompt, len(self.ip_adapters))
        if images.image_prompt_embeds is not None:
            self._check_embeds(images.image_prompt_embeds, images)

    def _check_embeds(self, embeds: Sequence[Tensor], images: ImageInputs) -> None:
        name = "ip_adapter_image_embeds"
        if images.image_prompt:
            raise InvalidSetting(f"{name} and image_prompt are both given: leave one of them out", field=name)
        if not self.ip_adapters:
            raise InvalidSetting(f"{name}: an IP-Adapter reads them, and there is none; load one", field=name)
        if len(embeds) != len(self.ip_adapters):
            raise InvalidSetting(
                f"{name}: {len(embeds)} tensors for {len(self.ip_adapters)} IP-Adapters; give one for each", field=name
            )
        for each, adapter in zip(embeds, self.ip_adapters, strict=True):
            if each.shape[2] != adapter.encoder.width:
                raise InvalidSetting(
                    f"{name} is {list(each.shape)}: must have the width of CLIP's embedding, {adapter.encoder.width}",
                    field=name,
                )

    def beside(self, texts: PromptEmbeds, images: ImageInputs) -> PromptEmbeds:
        """Return the embeddings of a call's texts, followed by a Redux's tokens, if any."""
        if self.redux is None or not images.image_prompt:
            return texts
        return self.redux.beside(texts, images.image_prompt, images.prompt_scales)

    def attended(self, images: ImageInputs, *, is_negative: bool = False) -> ImagePrompt | None:
        """Return the keys and values of IP-Adapters for the positive or the negative pass."""
        if not self.ip_adapters or (images.image_prompt is None and images.image_prompt_embeds is None):
            return None
        found = []
        for place, adapter in enumerate(self.ip_adapters):
            embeds, scales = self._embeds(images, place, adapter)
            found.append(adapter.prompt(adapter.negative_embeds(embeds) if is_negative else embeds, scales))
        return ImagePrompt.joined(found)

    def embeds(self, prompt: Any) -> list[Tensor]:
        """Return the embeddings of one prompt's images for each IP-Adapter: (1, k, e)."""
        if not self.ip_adapters:
            raise InvalidSetting(
                "ip_adapter_image: there is no IP-Adapter; load_ip_adapter loads one", field="ip_adapter_image"
            )
        images = image_inputs(1, {"image_prompt": prompt}, is_single=True)
        if images.image_prompt is None:
            raise InvalidSetting("ip_adapter_image: must be at least one image", field="ip_adapter_image")
        self.check(images)
        found = [self._embeds(images, place, adapter)[0] for place, adapter in enumerate(self.ip_adapters)]
        return [normal_tensor(embeds) for embeds in found]

    def _embeds(
        self, images: ImageInputs, place: int, adapter: IPAdapterPrompts
    ) -> tuple[Tensor, Sequence[Sequence[float]]]:
        """Return the embeddings (b, k, e) for an IP-Adapter, and their scales."""
        if images.image_prompt_embeds is not None:
            embeds = images.image_prompt_embeds[place].to(self._base["device"], self._base["dtype"])
            return embeds, [[1.0] * embeds.shape[1]] * len(embeds)
        prompts, scales = images.image_prompt or [], images.prompt_scales
        if len(self.ip_adapters) > 1:
            prompts = [as_images(each[place]) for each in prompts]
            scales = [[each[place]] * len(own) for own, each in zip(prompts, scales, strict=True)]
        return adapter.embeds(prompts), scales


def adapter_files(
    uri: PathOrFolder | Sequence[PathOrFolder],
    weight_name: str | Sequence[str] | None,
    subfolder: str | Sequence[str] | None = None,
) -> list[PathOrFolder]:
    """Return the files of IP-Adapters from diffusers' arguments. Raises: InvalidSetting if their numbers differ."""
    if not isinstance(uri, (str, PathLike, list, tuple)):
        raise InvalidSetting(f"uri = {uri!r}: must be a path or an address, or a list of them", field="uri")
    lists: dict[str, list[Any]] = {
        "uri": [uri] if isinstance(uri, (str, PathLike)) else list(uri),
        "subfolder": list(subfolder) if isinstance(subfolder, (list, tuple)) else [subfolder],
        "weight_name": list(weight_name) if isinstance(weight_name, (list, tuple)) else [weight_name],
    }
    count = max(map(len, lists.values()))
    for name, values in lists.items():
        if len(values) not in (1, count):
            raise InvalidSetting(f"{name}: {len(values)} for {count} IP-Adapters; give one for each", field=name)
    each = zip(*(values * count if len(values) == 1 else values for values in lists.values()), strict=True)
    return [_file_in(folder, *names) for folder, *names in each]


def _file_in(folder: PathOrFolder, *names: Any) -> PathOrFolder:
    """Return the path or address of a file in a folder; empty names are skipped."""
    parts = [str(name).strip("/") for name in names if name]
    return "/".join((str(folder).rstrip("/"), *parts)) if parts else folder


def _set_scales(adapters: Sequence[IPAdapterPrompts], scale: AdapterScale) -> None:
    """Set the strength of IP-Adapters: one number, or an entry for each. Raises: InvalidSetting."""
    entries: Any = [scale] * len(adapters)
    if isinstance(scale, Sequence) and (len(adapters) > 1 or any(isinstance(each, Sequence) for each in scale)):
        entries = scale
    if len(entries) != len(adapters):
        raise InvalidSetting(
            f"scale: {len(entries)} values for {len(adapters)} IP-Adapters; give one for each", field="scale"
        )
    checked = [adapter.block_scales(own) for adapter, own in zip(adapters, entries, strict=True)]
    for adapter, scales in zip(adapters, checked, strict=True):  # after all were checked
        adapter.set_scale(scales)


def _check_images_of_several(prompts: Sequence[Sequence[Any]], count: int) -> None:
    """Raise InvalidSetting unless there are images for each of several IP-Adapters."""
    for images in prompts:
        if len(images) != count:
            raise InvalidSetting(
                f"image_prompt: {len(images)} images for {count} IP-Adapters; give one for each in their order, or a "
                "list for each",
                field="image_prompt",
            )
        if [len(as_images(each)) for each in images] != [len(as_images(each)) for each in prompts[0]]:
            raise InvalidSetting(
                "image_prompt: the images of one call must have the same number for each IP-Adapter; make others in "
                "calls of their own",
                field="image_prompt",
            )


def _tower(
    found: Sequence[Checkpoint] | None, reader: Checkpoint, files: Callable[[Path], tuple[Path, Path]]
) -> Checkpoint:
    """Return the vision tower of a model: the one that was found, else the one in the folder beside it."""
    with checkpoint_errors():
        return found[-1] if found else open_checkpoint(files(Path(reader.source))[1])


def _check_one_reader(other: object | None) -> None:
    if other:
        raise InvalidSetting(
            "image_prompt: a FLUX.1-Redux and an IP-Adapter would both read it; load one of the two",
            field="image_prompt",
        )
