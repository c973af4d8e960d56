"""A call of the pipeline with its arguments checked and translated; nothing is computed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter
from numbers import Real
from typing import Any, TypeAlias

from torch import Tensor

from flux_batch.errors import InvalidSetting, did_you_mean
from flux_batch.model.optimize.tiling import Tiling
from flux_batch.model.params import FluxParams, first_step
from flux_batch.model.transformer import PromptEmbeds
from flux_batch.pipeline.images.controls import CONTROL_ARGUMENTS, ControlSetting, controls_of_diffsynth
from flux_batch.pipeline.images.inputs import ImageInputs
from flux_batch.sampling_params import (
    ALIASES,
    MAX_SEED,
    SAMPLING_FIELDS,
    SamplingParams,
    check_integer,
    check_step_cache,
    check_tiles,
)

# The spellings of diffusers and DiffSynth-Studio that a call accepts in addition to those of a job.
_CALL_ALIASES = {
    **ALIASES,
    "strength": "denoising_strength",
    "image": "input_image",
    "image_reference": "reference_image",
    "kontext_images": "reference_image",
    "ip_adapter_image": "image_prompt",
    "ip_adapter_image_embeds": "image_prompt_embeds",
    "control_mask": "mask_image",
    "flux_fill_image": "input_image",
    "flux_fill_mask": "mask_image",
    "flux_redux_image": "image_prompt",
    "ipadapter_images": "image_prompt",
    "ipadapter_scale": "image_prompt_scale",
}
# DiffSynth-Studio's argument for the images of ControlNets and their settings, a list of ControlNetInput.
_DIFFSYNTH_CONTROLS = "controlnet_inputs"
# The arguments of diffusers that a call refuses, and what to pass instead.
_INSTEAD = {
    "generator": ": pass seed, a whole number or one for each image",
    "num_images_per_prompt": ": pass a list with the prompt as often, and a seed for each",
    "prompt_2": ": both text encoders read the prompt, leave it out",
    "latents": ": noise is drawn by seed, leave it out",
    "sigmas": ": pass num_inference_steps, and sigma_shift for another schedule",
    "return_dict": ": images come as they are, leave it out",
    "callback_on_step_end_tensor_inputs": ": a callback always gets the latents, leave it out",
    "joint_attention_kwargs": ": load_lora and set_loras take the scale of a LoRA, leave it out",
    "negative_ip_adapter_image": ": a negative prompt has black images, leave it out",
    "negative_ip_adapter_image_embeds": ": a negative prompt has black images, leave it out",
}

# The prompts of a call, or the embeddings that stand in for them.
Texts: TypeAlias = list[str] | PromptEmbeds


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineRequest:
    """A checked call; each list has one entry for each image. Raises: InvalidSetting with the argument's name."""

    prompts: Texts
    sampling: list[SamplingParams]
    seeds: list[int | None]
    images: ImageInputs
    tiling: Tiling | None
    step_cache: float = 0.0
    negative_embeds: PromptEmbeds | None = None
    controls: tuple[ControlSetting, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.prompts, PromptEmbeds):
            check_texts("prompt", self.prompts)
        check_step_cache(self.step_cache)
        for seed in self.seeds:
            if seed is not None:
                check_integer("seed", seed, 0, MAX_SEED - 1)
        if self.tiling is not None:
            check_tiles(*self.tiling)
        if self.sampling:
            self._check_strength(self.shared.denoising_strength)

    def _check_strength(self, strength: float) -> None:
        if self.num_steps_left < 1:
            raise InvalidSetting(
                f"denoising_strength = {strength}: must leave at least one of {self.shared.num_inference_steps} steps "
                "to run",
                field="denoising_strength",
            )
        if strength < 1.0 and self.images.input_image is None:
            raise InvalidSetting(
                f"denoising_strength = {strength}: must be 1 without an input_image", field="denoising_strength"
            )

    @property
    def shared(self) -> SamplingParams:
        """The settings of the first image, for fields that are equal for all images."""
        return self.sampling[0]

    @property
    def negative_prompts(self) -> Texts:
        """The negative prompt of each image, or the embeddings that stand in for them."""
        return self.values("negative_prompt") if self.negative_embeds is None else self.negative_embeds

    @property
    def uses_cfg(self) -> bool:
        """True if a second pass with the negative prompts is needed."""
        return any(params.uses_cfg for params in self.sampling)

    @property
    def num_steps_left(self) -> int:
        """The number of steps without those that are skipped for an input image."""
        num_steps = self.shared.num_inference_steps
        return num_steps - first_step(num_steps, self.shared.denoising_strength)

    def t5_length(self, default: int) -> int:
        """Return the number of T5 tokens of each text."""
        if isinstance(self.prompts, PromptEmbeds):
            return self.prompts.prompt_embeds.shape[1]
        return self.shared.t5_sequence_length or default

    def values(self, name: str) -> list[Any]:
        """Return the value of one sampling field for each image."""
        return [getattr(params, name) for params in self.sampling]


def sampling_of_call(count: int, **arguments: Any) -> list[SamplingParams]:
    """Return the settings of each of `count` images from a call's arguments. Raises: InvalidSetting."""
    values = {
        name: one_each(name, value, count) if SAMPLING_FIELDS[name].is_per_image else [value] * count
        for name, value in arguments.items()
    }
    return [SamplingParams(**{name: each[index] for name, each in values.items()}) for index in range(count)]


def check_texts(name: str, texts: Sequence[Any]) -> None:
    """Raise InvalidSetting unless all texts are strings that a tokenizer takes."""
    for text in texts:
        if not isinstance(text, str):
            raise InvalidSetting(f"{name} = {text!r}: must be a string or a list of strings", field=name)
        try:
            text.encode()
        except UnicodeEncodeError as error:  # a lone surrogate, which JSON can spell
            raise InvalidSetting(f"{name} = {text!r}: must be valid Unicode", field=name) from error


def check_functions(**functions: Any) -> None:
    """Raise InvalidSetting for an argument, by name, that is neither None nor a function."""
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise InvalidSetting(f"{name} = {function!r}: must be a function, or None", field=name)


def as_list(name: str, texts: str | Sequence[str] | None) -> list[str]:
    """Return one text or several as a list. Raises: InvalidSetting for anything else."""
    if not isinstance(texts, (str, Sequence)):
        raise InvalidSetting(f"{name} = {texts!r}: must be a string or a list of strings", field=name)
    return [texts] if isinstance(texts, str) else list(texts)


def embeds_of(name: str, texts: Any, embeds: Tensor | None, pooled: Tensor | None) -> PromptEmbeds | None:
    """Return the embeddings that replace the argument `name`, or None.

    Raises: InvalidSetting if `texts` are given as well, or if only one of the two embeddings is given.
    """
    if embeds is None and pooled is None:
        return None
    embeds_name = f"{name}_embeds"
    if embeds is None or pooled is None:
        pooled_name = f"{name.replace('prompt', 'pooled_prompt')}_embeds"
        raise InvalidSetting(f"{embeds_name} and {pooled_name} go together: encode_prompt returns both", field=name)
    if not isinstance(embeds, Tensor) or embeds.ndim != 3:
        raise InvalidSetting(f"{embeds_name}: must be a tensor (b, l, d), of b texts and l tokens", field=embeds_name)
    if texts:
        raise InvalidSetting(f"{name} and {embeds_name} are both given: leave one of them out", field=embeds_name)
    return PromptEmbeds(embeds, pooled)


def check_embeds(request: PipelineRequest, length: int, p: FluxParams) -> None:
    """Raise InvalidSetting unless embeddings have the sizes of a model, and `length` tokens each."""
    count, wanted = num_texts(request.prompts), request.shared.t5_sequence_length
    if wanted not in (None, length):
        raise InvalidSetting(
            f"t5_sequence_length = {wanted}: prompt_embeds have {length} tokens; leave it out",
            field="t5_sequence_length",
        )
    for prefix, texts in (("", request.prompts), ("negative_", request.negative_prompts)):
        if isinstance(texts, PromptEmbeds):
            _check_shape(f"{prefix}prompt_embeds", texts.prompt_embeds, (count, length, p.context_in_dim))
            _check_shape(f"{prefix}pooled_prompt_embeds", texts.pooled_prompt_embeds, (count, p.vec_in_dim))


def _check_shape(name: str, tensor: Any, shape: tuple[int, ...]) -> None:
    """Raise InvalidSetting unless an argument is a tensor of that shape."""
    if not isinstance(tensor, Tensor) or tensor.shape != shape:
        got = list(tensor.shape) if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
        raise InvalidSetting(f"{name} is {got}: must be a tensor of shape {list(shape)}", field=name)


def num_texts(texts: Texts) -> int:
    """Return the number of prompts, or of embeddings that stand in for them."""
    return len(texts.prompt_embeds) if isinstance(texts, PromptEmbeds) else len(texts)


def one_each(name: str, value: Any, count: int) -> list[Any]:
    """Return one value for each image. Raises: InvalidSetting for a list of another length."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise InvalidSetting(f"{name}: {len(value)} values for {count} prompts; give one, or one each", field=name)
    return list(value)


def resolve_aliases(
    aliases: Mapping[str, Any], given: Mapping[str, Any], parameters: Mapping[str, Parameter]
) -> dict[str, Any]:
    """Return the arguments that have diffusers' or DiffSynth-Studio's names under our names.

    given: the arguments under our names. parameters: the parameters of the call, with their defaults.
    Raises: InvalidSetting for an unknown argument, with the nearest name or the argument to pass instead; and for an
    argument that is given under two names with different values, also through `controlnet_inputs`. None, and the
    default under our name, do not count as given.
    """
    _check_names(aliases, parameters)
    chosen = {
        name: value
        for name, value in given.items()
        if value is not None and not _is_same(value, _default_of(name, parameters))
    }
    found: dict[str, Any] = {}
    for name, value in aliases.items():
        if name == _DIFFSYNTH_CONTROLS or value is None:
            continue
        ours = _CALL_ALIASES[name]
        if not _is_same(chosen.get(ours, value), value):
            raise InvalidSetting(f"{name}: {ours} is given twice, leave one of them out", field=name)
        chosen[ours] = found[ours] = value
    if (inputs := aliases.get(_DIFFSYNTH_CONTROLS)) is not None:
        found |= _controls_beside(chosen, inputs)
    return found


def _check_names(aliases: Mapping[str, Any], parameters: Mapping[str, Parameter]) -> None:
    """Raise InvalidSetting for an unknown argument."""
    for name in aliases:
        if name not in (*_CALL_ALIASES, _DIFFSYNTH_CONTROLS):
            names = [name for name in parameters if name not in ("self", "aliases")] + list(_CALL_ALIASES)
            hint = _INSTEAD.get(name) or did_you_mean(name, names) or f"; there are {', '.join(sorted(names))}"
            raise InvalidSetting(f"{name} is not an argument of the pipeline{hint}", field=name)


def _controls_beside(chosen: Mapping[str, Any], inputs: Any) -> dict[str, Any]:
    """Return the arguments that `controlnet_inputs` replaces. Raises: InvalidSetting if one of them is given, too."""
    controls = controls_of_diffsynth(inputs)
    for name in (*controls, *(CONTROL_ARGUMENTS if controls else ())):
        if name in chosen and not _is_same(chosen[name], controls.get(name)):
            raise InvalidSetting(
                f"{_DIFFSYNTH_CONTROLS}: {name} is given, too; leave one of them out", field=_DIFFSYNTH_CONTROLS
            )
    return controls


def _default_of(name: str, parameters: Mapping[str, Parameter]) -> Any:
    return parameters[name].default if name in parameters else None


def _is_same(one: Any, other: Any) -> bool:
    """Return whether two values are the same object or equal numbers, or lists of these."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return one is other or (isinstance(one, Real) and isinstance(other, Real) and one == other)
