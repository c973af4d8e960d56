"""Compares the pipeline with that of diffusers: the same calls of both, within tolerances."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image
from torch import Tensor

from flux_batch import FluxImagePipeline
from helpers.tiny_calls import PROMPTS, SEEDS


def load_reference(folder: Path, kind: type = FluxPipeline, dtype: torch.dtype = torch.float32) -> Any:
    reference = kind.from_pretrained(folder, dtype=dtype)
    reference.set_progress_bar_config(disable=True)
    return reference


def as_reference_arguments(
    prompts: Sequence[str], seeds: Sequence[int], *, output_type: str, **options: Any
) -> dict[str, Any]:
    return {
        "prompt": list(prompts),
        "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        "output_type": output_type,
        **options,
    }


def default_length(reference: Any) -> int:
    """Return a model's default number of T5 tokens; diffusers uses 512 for any model."""
    return int(reference.tokenizer_2.model_max_length)


def reference_latents(reference: Any, height: int, width: int, **arguments: Any) -> Tensor:
    """Return the final latents of diffusers, unpacked: (b, 16, height/8, width/8)."""
    arguments.setdefault("max_sequence_length", default_length(reference))
    with torch.inference_mode():
        tokens = reference(height=height, width=width, **arguments).images
    return reference._unpack_latents(tokens, height, width, reference.vae_scale_factor)


def assert_same(
    pipe: FluxImagePipeline,
    reference: Any,
    *,
    prompts: Sequence[str] = PROMPTS,
    seeds: Sequence[int] = SEEDS,
    height: int = 64,
    width: int = 96,
    num_inference_steps: int = 3,
    ours: dict[str, Any] | None = None,
    theirs: dict[str, Any] | None = None,
    decoded: bool = True,
) -> None:
    """Assert that latents, and if `decoded` pixels, equal those of diffusers, within 1e-4 and one level.

    Decode to test models and sizes with the decoder; latents alone are enough to test a call.
    """
    size = {"height": height, "width": width, "num_inference_steps": num_inference_steps}
    output_type = "pil" if decoded else "latent"
    theirs = {"max_sequence_length": default_length(reference), **(theirs or {})}
    arguments = as_reference_arguments(prompts, seeds, output_type=output_type, **size, **theirs)
    # Intercept the latents before they are decoded, so that one call gives both.
    unpack, decode = reference._unpack_latents, pipe.latents.decode
    with (
        patch.object(reference, "_unpack_latents", wraps=unpack) as unpacking,
        patch.object(pipe.latents, "decode", wraps=decode) as decoding,
    ):
        result = pipe(list(prompts), seed=list(seeds), output_type=output_type, **size, **(ours or {}))
        if not decoded:
            torch.testing.assert_close(result, reference_latents(reference, **arguments), atol=1e-4, rtol=0)
            return
        expected = reference(**arguments).images
    latents = decoding.call_args.args[0]
    torch.testing.assert_close(latents, unpack(*unpacking.call_args.args), atol=1e-4, rtol=0)
    for image, theirs_of_it in zip(result, expected, strict=True):
        assert_within_one_level(image, theirs_of_it)


def assert_within_one_level(image: Image.Image, expected: Image.Image) -> None:
    assert image.size == expected.size
    assert image.mode == expected.mode == "RGB"
    difference = np.abs(np.asarray(image, dtype=int) - np.asarray(expected, dtype=int))
    assert difference.max() <= 1
