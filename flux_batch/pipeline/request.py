"""One call of the pipeline, checked: what to make from which texts and images.

Knows words and ranges, and how many steps an input image leaves; computes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from flux_batch.errors import InvalidSetting, did_you_mean
from flux_batch.model.optimize.tiling import Tiling
from flux_batch.model.params import first_step
from flux_batch.sampling_params import (
    ALIASES,
    MAX_SEED,
    SAMPLING_FIELDS,
    SamplingParams,
    check_integer,
    check_step_cache,
    check_tiles,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineRequest:
    """One call, checked: each list has one entry an image. Raises: InvalidSetting naming the argument."""

    prompts: list[str]
    sampling: list[SamplingParams]
    seeds: list[int | None]
    input_images: list[Image.Image] | None
    tiling: Tiling | None
    step_cache: float = 0.0

    def __post_init__(self) -> None:
        for text in self.prompts:
            if not isinstance(text, str):
                raise InvalidSetting(f"prompt = {text!r}: must be a string or a list of strings", field="prompt")
        check_step_cache(self.step_cache)
        for seed in self.seeds:
            if seed is not None:
                check_integer("seed", seed, 0, MAX_SEED)
        if self.tiling is not None:
            check_tiles(*self.tiling)
        if self.prompts:
            self._check_strength(self.shared.denoising_strength)

    def _check_strength(self, strength: float) -> None:
        if self.num_steps_left < 1:
            raise InvalidSetting(
                f"denoising_strength = {strength}: must leave at least one of {self.shared.num_inference_steps} steps "
                "to run",
                field="denoising_strength",
            )
        if strength < 1.0 and self.input_images is None:
            raise InvalidSetting(
                f"denoising_strength = {strength}: must be 1 without an input_image", field="denoising_strength"
            )

    @property
    def shared(self) -> SamplingParams:
        """The settings that all images have in common, beside those of the first one."""
        return self.sampling[0]

    @property
    def negative_prompts(self) -> list[str]:
        """The negative prompt of each image."""
        return self.values("negative_prompt")

    @property
    def uses_cfg(self) -> bool:
        """Whether a second pass with the negative prompts is needed."""
        return any(params.uses_cfg for params in self.sampling)

    @property
    def num_steps_left(self) -> int:
        """Steps that remain after those that an input image skips."""
        num_steps = self.shared.num_inference_steps
        return num_steps - first_step(num_steps, self.shared.denoising_strength)

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


def one_each(name: str, value: Any, count: int) -> list[Any]:
    """Return one value an image. Raises: InvalidSetting for a list of another length."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise InvalidSetting(f"{name}: {len(value)} values for {count} prompts; give one, or one each", field=name)
    return list(value)


def resolve_aliases(aliases: Mapping[str, Any], arguments: Iterable[str]) -> dict[str, Any]:
    """Return other arguments under our names. Raises: InvalidSetting with the nearest name for one that is unknown."""
    for name in aliases:
        if name not in ALIASES:
            names = [name for name in arguments if name not in ("aliases", "return")] + list(ALIASES)
            hint = did_you_mean(name, names) or f"; there are {', '.join(sorted(names))}"
            raise InvalidSetting(f"{name} is no argument of the pipeline{hint}", field=name)
    return {ALIASES[name]: value for name, value in aliases.items()}
