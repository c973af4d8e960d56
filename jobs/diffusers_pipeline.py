"""Any text-to-image pipeline of diffusers as the pipeline of a job; `model_index.json` names its class.

    model:
      uri: PixArt-alpha/PixArt-Sigma-XL-2-1024-MS         # or a folder
      pipeline: jobs.diffusers_pipeline:DiffusersPipeline
      pipeline_options: {variant: fp16}                   # of the class's from_pretrained

Run the job from the folder above jobs/diffusers_pipeline.py, or with that folder on PYTHONPATH. flux-batch does not
install diffusers; 0.42 or later is needed. A setting is known if the pipeline's call has an argument for it. A job's
`embedded_guidance`, also spelled `guidance_scale`, is passed as `guidance_scale`, even if that is the scale of
classifier-free guidance. Each image has its own generator on the CPU, so it does not depend on the other images of its
batch, up to rounding.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from flux_batch.config.schema import ModelConfig
from flux_batch.errors import JobError, RowError

# Our name of a setting: the argument of the pipeline's call.
_ARGUMENTS = {
    "num_inference_steps": "num_inference_steps",
    "embedded_guidance": "guidance_scale",
    "cfg_scale": "true_cfg_scale",
    "negative_prompt": "negative_prompt",
    "t5_sequence_length": "max_sequence_length",
}
_NEEDED = ("prompt", "height", "width", "generator", "output_type")


class DiffusersPipeline:
    """A pipeline of diffusers; `settings` are those that its call accepts."""

    def __init__(self, model: ModelConfig, *, device: str, **options: Any) -> None:
        """Load it from a folder or a repository, without pickles. Raises: JobError if it is not text-to-image."""
        from diffusers import DiffusionPipeline

        name = model.dtype
        if name == "auto":
            name = "bfloat16" if device == "cuda" and torch.cuda.is_bf16_supported() else "float32"
        self.precision = {"dtype": name, "quantization": "none"}
        self._pipe = DiffusionPipeline.from_pretrained(
            model.uri, dtype=getattr(torch, name), use_safetensors=True, **options
        ).to(device)
        self._pipe.set_progress_bar_config(disable=True)
        parameters = inspect.signature(self._pipe.__call__).parameters
        if missing := [each for each in _NEEDED if each not in parameters]:
            raise JobError(
                f"{model.uri}: {type(self._pipe).__name__} is not text-to-image: its call takes no {missing[0]}"
            )
        self.settings = frozenset(ours for ours, theirs in _ARGUMENTS.items() if theirs in parameters)
        guidance = parameters["guidance_scale"].default if "guidance_scale" in parameters else 0.0
        self.default_guidance = float(guidance if isinstance(guidance, (int, float)) else 0.0)

    def __call__(
        self, prompt: Sequence[str], *, seed: Sequence[int], width: int, height: int, **given: Any
    ) -> list[Any]:
        """Make one image for each prompt; prompts with the same guidance share a call."""
        scales = [given.pop(name) for name in ("embedded_guidance", "cfg_scale") if name in given]
        names = [_ARGUMENTS[name] for name in ("embedded_guidance", "cfg_scale") if name in self.settings]
        negative = given.pop("negative_prompt", None)
        shared = {_ARGUMENTS[name]: value for name, value in given.items() if value is not None}
        made: list[Any] = [None] * len(prompt)
        each_scale = list(zip(*scales, strict=True)) if scales else [()] * len(prompt)
        for scale in dict.fromkeys(each_scale):
            places = [place for place, own in enumerate(each_scale) if own == scale]
            arguments = shared | dict(zip(names, scale, strict=True))
            if negative is not None:
                arguments["negative_prompt"] = [negative[place] for place in places]
            result = self._pipe(
                prompt=[prompt[place] for place in places],
                generator=[torch.Generator("cpu").manual_seed(seed[place]) for place in places],
                width=width,
                height=height,
                output_type="np",
                **arguments,
            )
            refused = getattr(result, "nsfw_content_detected", None) or [False] * len(places)
            for place, image, is_refused in zip(places, result.images, refused, strict=True):
                made[place] = RowError("the safety checker removed the image") if is_refused else _to_uint8(image)
        return made


def _to_uint8(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return an image of diffusers, (h, w, 3) in [0, 1], as uint8, rounded as diffusers does."""
    if not np.isfinite(image).all():
        raise RowError("the image has values that are not finite: try another dtype")
    return (image * 255).round().astype(np.uint8)
