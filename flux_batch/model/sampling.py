"""The way from noise to latents: noise, packing, positions, schedules and the Euler loop.

Letters: b batch, c latent channels, h and w of the latents, n packed tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor

from flux_batch.model.params import ScheduleParams, first_step

# Dtype and device of tensors that the host creates, independent of torch's defaults, which a program may change.
HOST: Mapping[str, Any] = {"dtype": torch.float32, "device": "cpu"}
# The last level of noise in DiffSynth-Studio's static schedule (fed7b18, diffsynth/diffusion/flow_match.py, FLUX.1).
_STATIC_SIGMA_MIN = 0.003 / 1.002

Progress = Callable[[Iterable[int]], Iterable[int]]


class Velocity(Protocol):
    """The model of `denoise`: returns the velocity of packed latents at a step, in the same shape."""

    def __call__(self, step: int, img: Tensor) -> Tensor: ...


def make_generators(seeds: Sequence[int | None]) -> list[torch.Generator | None]:
    """Return a CPU generator for each seed; None stands for torch's global generator."""
    return [None if seed is None else torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]


def make_noise(shape: Sequence[int], generators: Sequence[torch.Generator | None]) -> Tensor:
    """Return standard normal noise of `shape` (c, h, w) from each generator: (b, c, h, w) fp32 on the CPU.

    Each image is drawn alone, so that it does not depend on its neighbours. Rounded to bfloat16, the noise equals that
    of BFL and diffusers on the CPU for the same seed.
    """
    return torch.cat([torch.randn((1, *shape), generator=generator, **HOST) for generator in generators])


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device. The host does not wait until a GPU has copied it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def normal_tensor(values: Tensor) -> Tensor:
    """Return a normal copy of an inference tensor, which autograd can use."""
    with torch.inference_mode(False):
        return values.clone()


def pack(latents: Tensor) -> Tensor:
    """Return a token for each 2 x 2 patch: (b, c, 2h, 2w) -> (b, h w, 4c)."""
    return rearrange(latents, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=2, pw=2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return the latents of tokens, `height` x `width`: the inverse of `pack`."""
    return rearrange(tokens, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=height // 2, w=width // 2, ph=2, pw=2)


def position_ids(
    num_txt_tokens: int, height: int, width: int, references: Sequence[tuple[int, int, int, int]] = ()
) -> Tensor:
    """Return positions of text (0, 0, 0), then of latent patches (0, row, col): (l + n, 3) fp32.

    references: height and width in latents, first row and column in tokens. Their positions (1, row, col) come between
    text and latents.
    """
    places = [_patch_positions(1, *reference) for reference in references]
    return torch.cat((torch.zeros(num_txt_tokens, 3, **HOST), *places, _patch_positions(0, height, width)))


def _patch_positions(first: int, height: int, width: int, row: int = 0, col: int = 0) -> Tensor:
    """Return the positions of latent patches: (n, 3) fp32."""
    along = torch.arange(row, row + height // 2, **HOST), torch.arange(col, col + width // 2, **HOST)
    rows, cols = torch.meshgrid(*along, indexing="ij")
    return torch.stack((torch.full_like(rows, first), rows, cols), dim=-1).reshape(-1, 3)


def make_sigmas(
    num_steps: int, num_tokens: int, schedule: ScheduleParams, sigma_shift: float | None = None, strength: float = 1.0
) -> Tensor:
    """Return the noise level at each step and the final 0: (num_steps + 1,) fp32 on the CPU, falling from 1.

    num_tokens: of the packed image; larger images stay noisy for longer. sigma_shift: use DiffSynth-Studio's static
    schedule with this shift instead. strength: of image-to-image. Below 1, diffusers skips the first steps, while
    DiffSynth-Studio's schedule runs all steps from a lower start. Source: diffusers 0.42.1, FluxPipeline's call and
    FlowMatchEulerDiscreteScheduler.set_timesteps; BFL's differs by at most one unit in the last place.
    """
    if sigma_shift is not None:
        start = _STATIC_SIGMA_MIN + (1.0 - _STATIC_SIGMA_MIN) * strength
        sigmas = _static_shift(torch.linspace(start, _STATIC_SIGMA_MIN, num_steps, **HOST), sigma_shift)
    else:
        sigmas = torch.linspace(1.0, 1.0 / num_steps, num_steps, dtype=torch.float64, device="cpu").float()
        if schedule.use_dynamic_shifting:
            shift = math.exp(shift_exponent(num_tokens, schedule))
            sigmas = shift / (shift + (1.0 / sigmas - 1.0))
        else:
            sigmas = _static_shift(sigmas, schedule.shift)
        sigmas = sigmas[first_step(num_steps, strength) :]
    return torch.cat((sigmas, torch.zeros(1, **HOST)))


def shift_exponent(num_tokens: int, schedule: ScheduleParams) -> float:
    """Return mu: linear in the number of tokens, also beyond the range of the schedule."""
    slope = (schedule.max_shift - schedule.base_shift) / (schedule.max_image_seq_len - schedule.base_image_seq_len)
    return schedule.base_shift + (num_tokens - schedule.base_image_seq_len) * slope


def timesteps_of(sigmas: Tensor, like: Tensor) -> Tensor:
    """Return the timestep of each step: (steps + 1,) -> (steps,), in the dtype and on the device of `like`.

    Rounded as in diffusers: 1000 sigma in that dtype, then / 1000 (the model multiplies again).
    """
    return on_device((1000.0 * sigmas[:-1]).to(like.dtype), like.device) / 1000.0


def _static_shift(sigmas: Tensor, shift: float) -> Tensor:
    return shift * sigmas / (1.0 + (shift - 1.0) * sigmas)


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return latents at noise level `sigma`, rounded first to their dtype as in diffusers."""
    sigma = on_device(sigma.to(latents.dtype), latents.device)
    return sigma * noise + (1.0 - sigma) * latents


def denoise(
    velocity: Velocity,
    img: Tensor,
    sigmas: Tensor,
    *,
    negative: Velocity | None = None,
    cfg_scale: Tensor | None = None,
    progress: Progress | None = None,
    after_step: Callable[[int, Tensor], Tensor] | None = None,
) -> Tensor:
    """Return packed latents at `sigmas[-1]`, from those at `sigmas[0]`: (b, n, 4c), in the same dtype.

    negative, cfg_scale: the velocity for the negative prompts, and the scales (b,) of true classifier-free guidance. An
    image whose scale is exactly 1 uses the positive pass unchanged, so that neighbours in the batch do not affect it.
    progress: wraps the iteration over steps, as tqdm does. after_step: changes the latents after each step. Each step
    rounds its change to the dtype of the velocity and adds it in fp32, as in diffusers; on the CPU the width of the
    step is rounded as well.
    """
    # 0-dim tensors on the CPU, as in diffusers: on some devices torch rounds them differently than Python numbers.
    deltas = [after - before for before, after in pairwise(sigmas.cpu())]
    steps: Iterable[int] = range(len(deltas))
    for step in steps if progress is None else progress(steps):
        change = velocity(step, img)
        if negative is not None and cfg_scale is not None:
            change = guide(change, negative(step, img), cfg_scale)
        img = (img.float() + deltas[step] * change).to(img.dtype)
        if after_step is not None:
            img = after_step(step, img)
    return img


def guide(positive: Tensor, negative: Tensor, cfg_scale: Tensor) -> Tensor:
    """Return the extrapolation from the negative velocity through the positive: (b, n, c), scale (b,).

    Rounds as diffusers does, in the dtype of the velocities: first the scaled difference, then the sum.
    """
    scale = cfg_scale[:, None, None]
    guided = negative + (scale * (positive - negative)).to(positive.dtype)
    return torch.where(scale == 1.0, positive, guided)
