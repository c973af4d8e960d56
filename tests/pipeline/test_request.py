"""Refused calls: each error names the argument and says what would be right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from flux_batch import FluxImagePipeline
from flux_batch.errors import InvalidSetting
from helpers.tiny_calls import SMALL
from helpers.tiny_flux import CLIP_WIDTH, T5_WIDTH

SMALL_IMAGE = Image.new("RGB", (8, 8))


def embeds(num_texts: int, length: int, prefix: str = "") -> dict[str, Tensor]:
    """Return arguments of a call with embeddings of zeros."""
    return {
        f"{prefix}prompt_embeds": torch.zeros(num_texts, length, T5_WIDTH),
        f"{prefix}pooled_prompt_embeds": torch.zeros(num_texts, CLIP_WIDTH),
    }


BAD_CALLS: dict[str, tuple[dict[str, Any], str, str]] = {
    "size": ({"height": 1000}, "height", "height = 1000.* 992 and 1008"),
    "width": ({"width": 24}, "width", "width = 24.* 16 and 32"),
    "size 0": ({"width": 0}, "width", "from 16 to"),
    "fractional size": ({"width": 64.0}, "width", "whole number"),
    "NaN guidance": ({"embedded_guidance": float("nan")}, "embedded_guidance", "finite number"),
    "one NaN guidance": ({"embedded_guidance": [1.0, float("inf")]}, "embedded_guidance", "finite number"),
    "guidance as text": ({"guidance_scale": "3.5"}, "embedded_guidance", "finite number"),
    "negative cfg": ({"cfg_scale": -1.0}, "cfg_scale", "at least 0"),
    "negative steps": ({"num_inference_steps": -1}, "num_inference_steps", "from 1 to"),
    "no steps": ({"num_inference_steps": 0}, "num_inference_steps", "from 1 to"),
    "True steps": ({"num_inference_steps": True}, "num_inference_steps", "whole number"),
    "list lengths": ({"seed": [1, 2, 3]}, "seed", "3 values for 2 prompts"),
    "empty list": ({"cfg_scale": []}, "cfg_scale", "0 values for 2 prompts"),
    "negative prompts": ({"negative_prompt": ["a"]}, "negative_prompt", "1 values for 2 prompts"),
    "negative prompt None": ({"negative_prompt": None}, "negative_prompt", "must be a string"),
    "prompt None": ({"prompt": None}, "prompt", "must be a string or a list"),
    "prompt of None": ({"prompt": ["a", None]}, "prompt", "must be a string or a list"),
    "negative seed": ({"seed": -1}, "seed", "from 0 to"),
    "seed as text": ({"seed": "1"}, "seed", "whole number"),
    "huge seed": ({"seed": 2**64}, "seed", "from 0 to"),
    "T5 length 0": ({"t5_sequence_length": 0}, "t5_sequence_length", "from 1 to"),
    "generator": (
        {"generator": torch.Generator()},
        "generator",
        "is not an argument of the pipeline: pass seed",
    ),
    "several images a prompt": (
        {"num_images_per_prompt": 2},
        "num_images_per_prompt",
        "is not an argument of the pipeline: pass a list with the prompt as often",
    ),
    "two names of one argument": (
        {"image": SMALL_IMAGE, "flux_fill_image": SMALL_IMAGE.copy()},
        "flux_fill_image",
        "flux_fill_image: input_image is given twice",
    ),
    "two spellings of one setting": (
        {"guidance_scale": 3.0, "embedded_guidance": 2.0},
        "guidance_scale",
        "guidance_scale: embedded_guidance is given twice",
    ),
    "two spellings of one image": (
        {"image": SMALL_IMAGE, "input_image": SMALL_IMAGE.copy()},
        "image",
        "image: input_image is given twice",
    ),
    "two weights of one image": (
        {"image_prompt_scale": [0.5, 1.0], "ipadapter_scale": [0.5, 0.7]},
        "ipadapter_scale",
        "ipadapter_scale: image_prompt_scale is given twice",
    ),
    "DiffSynth's inputs beside an image": (
        {"controlnet_inputs": [{"image": SMALL_IMAGE}], "control_image": SMALL_IMAGE},
        "controlnet_inputs",
        "controlnet_inputs: control_image is given, too",
    ),
    "DiffSynth's inputs beside a strength": (
        {"controlnet_inputs": [{"image": SMALL_IMAGE}], "controlnet_conditioning_scale": 0.5},
        "controlnet_inputs",
        "controlnet_inputs: controlnet_conditioning_scale is given, too",
    ),
    "DiffSynth's inputs beside a mask": (
        {
            "controlnet_inputs": [{"image": SMALL_IMAGE, "inpaint_mask": SMALL_IMAGE}],
            "control_mask": SMALL_IMAGE.copy(),
        },
        "controlnet_inputs",
        "controlnet_inputs: mask_image is given, too",
    ),
    "no such name": ({"guidence_scale": 1}, "guidence_scale", r"did you mean 'guidance_scale'\?"),
    "nearest name": ({"hight": 64}, "hight", r"did you mean 'height'\?"),
    "nothing near": ({"zzz": 64}, "zzz", "is not an argument of the pipeline; there are callback_on_step_end, "),
    "output type": ({"output_type": "jpeg"}, "output_type", "must be one of pil, np, pt, latent"),
    "strength 0": (
        {"input_image": Image.new("RGB", (8, 8)), "denoising_strength": 0.0},
        "denoising_strength",
        "more than 0",
    ),
    "no step left": (
        {"input_image": Image.new("RGB", (8, 8)), "denoising_strength": 1e-20},
        "denoising_strength",
        "leave",
    ),
    "strength 2": ({"denoising_strength": 2.0}, "denoising_strength", "at most 1"),
    "strength alone": ({"denoising_strength": 0.5}, "denoising_strength", "must be 1 without an input_image"),
    "stride": ({"tiled": True, "tile_stride": 129}, "tile_stride", "tile_stride = 129.* from 1 to 128"),
    "tile": ({"tiled": True, "tile_size": 8}, "tile_size", "tile_size = 8.* from 16 to"),
    "shift 0": ({"sigma_shift": 0.0}, "sigma_shift", "more than 0"),
    "image": ({"input_image": "cat.png"}, "input_image", "must be a PIL image"),
    "prompt and embeds": (embeds(2, 8), "prompt_embeds", "both given"),
    "embeds alone": (
        {"prompt": None, "prompt_embeds": torch.zeros(2, 8, T5_WIDTH)},
        "prompt",
        "prompt_embeds and pooled_prompt_embeds go together",
    ),
    "embeds that are no tensor": ({"prompt": None, **embeds(2, 8), "prompt_embeds": 3}, "prompt_embeds", "be a tensor"),
    "embeds of another width": (
        {"prompt": None, **embeds(2, 8), "prompt_embeds": torch.zeros(2, 8, 3)},
        "prompt_embeds",
        rf"is \[2, 8, 3\]: must be a tensor of shape \[2, 8, {T5_WIDTH}\]",
    ),
    "embeds of another length": (
        {"prompt": None, **embeds(2, 8), "t5_sequence_length": 16},
        "t5_sequence_length",
        "prompt_embeds have 8 tokens",
    ),
    "negative embeds of one more text": (
        embeds(3, 64, "negative_"),
        "negative_prompt_embeds",
        r"must be a tensor of shape \[2, ",
    ),
    "half a character": ({"prompt": ["a", "\ud800"]}, "prompt", "must be valid Unicode"),
    "a bar that is no function": ({"progress_bar": True}, "progress_bar", "progress_bar = True: must be a function"),
    "a callback that is none": ({"callback_on_step_end": [print]}, "callback_on_step_end", "must be a function"),
    "a callback that returns latents alone": (
        {"callback_on_step_end": lambda pipe, step, time, given: given["latents"]},
        "callback_on_step_end",
        "returned a Tensor: must be None, or latents by name",
    ),
    "a callback that returns others": (
        {"callback_on_step_end": lambda pipe, step, time, given: {"latents": given["latents"][:1]}},
        "callback_on_step_end",
        r"returned latents \[1, 24, 64\]: must be \[2, 24, 64\], as given",
    ),
    "DiffSynth's inputs not in a list": ({"controlnet_inputs": 3}, "controlnet_inputs", "is a int: must be a list"),
    "DiffSynth's inputs without fields": ({"controlnet_inputs": [3]}, "controlnet_inputs", "holds a int: must hold"),
    "strengths in an array, without a net": (
        {"controlnet_conditioning_scale": np.array([1.0, 0.5])},
        "controlnet_conditioning_scale",
        "the model has no ControlNet",
    ),
    "32 bits": ({"input_image": Image.new("F", (8, 8))}, "input_image", "32-bit samples"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_call_names_the_argument_and_what_would_be_right(pipe: FluxImagePipeline, name: str) -> None:
    options, field, message = BAD_CALLS[name]
    with pytest.raises(InvalidSetting, match=message) as caught:
        pipe(**{"prompt": ["a", "b"], **SMALL, **options})
    assert caught.value.field == field


def test_numbers_of_numpy_are_numbers(pipe: FluxImagePipeline) -> None:
    given = {"num_inference_steps": np.int64(2), "embedded_guidance": np.float32(3.5), "cfg_scale": np.int64(1)}
    given |= {"controlnet_conditioning_scale": np.float32(1), "control_guidance_start": [np.float32(0)]}
    options = {**SMALL, "seed": np.int64(1), "output_type": "latent"}
    plain = {name: np.array(value).tolist() for name, value in given.items()}
    assert torch.equal(pipe("x", **options | given), pipe("x", **options | plain))


def test_a_second_name_of_an_argument_may_be_none(pipe: FluxImagePipeline) -> None:
    common = {"denoising_strength": 0.5, "seed": 1, "output_type": "latent", **SMALL}
    expected = pipe("x", input_image=SMALL_IMAGE, **common)
    for names in (("image", "flux_fill_image"), ("flux_fill_image", "image")):
        given = dict(zip(names, (SMALL_IMAGE, None), strict=True))
        assert torch.equal(pipe("x", **common, **given), expected)
        assert torch.equal(pipe("x", **common, **dict(reversed(given.items()))), expected)


@pytest.mark.parametrize(
    ("alias", "ours", "value"),
    [("guidance_scale", "embedded_guidance", 3.0), ("true_cfg_scale", "cfg_scale", 4.0)],
)
def test_two_spellings_of_one_value_are_no_contradiction(
    pipe: FluxImagePipeline, alias: str, ours: str, value: float
) -> None:
    common = {"seed": 1, "output_type": "latent", **SMALL}
    expected = pipe("x", **common, **{ours: value})
    for one, other in (
        (value, np.float32(value)),
        ([value], (value,)),
        (np.float32(1.0) if value == 4 else None, value),
    ):
        assert torch.equal(pipe("x", **common, **{ours: one, alias: other}), expected)


def test_an_alias_without_a_value_is_left_out(pipe: FluxImagePipeline) -> None:
    common = {"seed": 1, "output_type": "latent", **SMALL}
    scaled = pipe("x", **common, cfg_scale=4.0)
    assert torch.equal(pipe("x", **common, cfg_scale=None, true_cfg_scale=4.0), scaled)
    nothing = dict.fromkeys(("guidance_scale", "true_cfg_scale", "max_sequence_length", "strength", "image"))
    assert torch.equal(pipe("x", **common, **nothing), pipe("x", **common))
