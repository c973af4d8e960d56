"""One call of the pipeline, checked: what to make from which texts and images.

Knows words and ranges, and how many steps an input image leaves; computes nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from flux_batch.errors import InvalidSetting
from flux_batch.model.optimize.tiling import Tiling
from flux_batch.model.params import first_step
from flux_batch.records import (
    ALIASES,
    MAX_SEED,
    MAX_STEPS,
    check_integer,
    check_scale,
    check_shift,
    check_side,
    check_step_cache,
    check_tiles,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRequest:
    """One call, checked: lists have one entry an image. Raises: InvalidSetting naming the argument."""

    prompts: list[str]
    negative_prompts: list[str]
    height: int
    width: int
    num_inference_steps: int
    embedded_guidance: list[float]
    cfg_scale: list[float]
    seeds: list[int | None]
    t5_sequence_length: int | None
    input_images: list[Image.Image] | None
    denoising_strength: float
    sigma_shift: float | None
    tiling: Tiling | None
    step_cache: float = 0.0

    def __post_init__(self) -> None:
        for name, texts in (("prompt", self.prompts), ("negative_prompt", self.negative_prompts)):
            for text in texts:
                if not isinstance(text, str):
                    raise InvalidSetting(f"{name} = {text!r}: must be a string or a list of strings", field=name)
        check_step_cache(self.step_cache)
        check_side("height", self.height)
        check_side("width", self.width)
        check_integer("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS)
        for guidance in self.embedded_guidance:
            check_scale("embedded_guidance", guidance)
        for scale in self.cfg_scale:
            check_scale("cfg_scale", scale)
        for seed in self.seeds:
            if seed is not None:
                check_integer("seed", seed, 0, MAX_SEED)
        if self.t5_sequence_length is not None:
            check_integer("t5_sequence_length", self.t5_sequence_length, 1, 4096)
        check_scale("denoising_strength", self.denoising_strength)
        if self.denoising_strength > 1.0 or self.num_steps_left < 1:
            raise InvalidSetting(
                f"denoising_strength = {self.denoising_strength}: must be at most 1 and leave at least one of "
                f"{self.num_inference_steps} steps to run",
                field="denoising_strength",
            )
        if self.denoising_strength < 1.0 and self.input_images is None:
            raise InvalidSetting(
                f"denoising_strength = {self.denoising_strength}: must be 1 without an input_image",
                field="denoising_strength",
            )
        if self.tiling is not None:
            check_tiles(*self.tiling)
        if self.sigma_shift is not None:
            check_shift("sigma_shift", self.sigma_shift)

    @property
    def uses_cfg(self) -> bool:
        """Whether a second pass with the negative prompts is needed."""
        return any(scale != 1.0 for scale in self.cfg_scale)

    @property
    def num_steps_left(self) -> int:
        """Steps that remain after those that an input image skips."""
        return self.num_inference_steps - first_step(self.num_inference_steps, self.denoising_strength)


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
            near = difflib.get_close_matches(name, names, n=1)
            hint = f": did you mean {near[0]}?" if near else f"; there are {', '.join(sorted(names))}"
            raise InvalidSetting(f"{name} is no argument of the pipeline{hint}", field=name)
    return {ALIASES[name]: value for name, value in aliases.items()}
