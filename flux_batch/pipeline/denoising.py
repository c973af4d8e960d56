"""From the texts and conditions of a call to latents: the inputs of the model at each step, and the denoising loop.

A new kind of condition takes one line here, which adds it to the texts, to the tokens or to the model's blocks.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flux_batch.model.conditions.controlnet import Controls
from flux_batch.model.optimize.step_cache import StepCache
from flux_batch.model.sampling import (
    HOST,
    Progress,
    Velocity,
    denoise,
    make_sigmas,
    on_device,
    pack,
    timesteps_of,
    unpack,
)
from flux_batch.model.transformer import Denoiser, PromptEmbeds
from flux_batch.pipeline.images.latents import StepCallback, after_each_step
from flux_batch.pipeline.request import PipelineRequest, Texts

if TYPE_CHECKING:
    from flux_batch.pipeline.pipeline import FluxImagePipeline


def denoised(
    pipe: FluxImagePipeline,
    request: PipelineRequest,
    progress_bar: Progress | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Return the scaled latents of a call, after encoding and denoising: (b, c, height/8, width/8)."""
    p = request.shared
    downscale = pipe.autoencoder.params.downscale
    height, width = p.height // downscale, p.width // downscale
    length = request.t5_length(pipe.default_t5_sequence_length)
    num_tokens = height // 2 * (width // 2)  # reference images are not noised and do not count
    sigmas = make_sigmas(p.num_inference_steps, num_tokens, pipe.schedule, p.sigma_shift, p.denoising_strength)
    guidance = on_device(torch.tensor(request.values("embedded_guidance"), **HOST).to(pipe.torch_dtype), pipe.device)
    timesteps = timesteps_of(sigmas, guidance)

    def embedded(texts: Texts) -> PromptEmbeds:
        embeds = texts if isinstance(texts, PromptEmbeds) else pipe.texts.encode(texts, length)
        return embeds.to(pipe.device, pipe.torch_dtype)

    def velocity(embeds: PromptEmbeds, *, is_negative: bool = False) -> Velocity:
        prompt = pipe.image_prompts.attended(request.images, is_negative=is_negative)
        pe = pipe.position_tables(embeds.prompt_embeds.shape[1], height, width, pipe.latents.places(request))
        model = Denoiser(pipe.transformer, embeds, pe, timesteps, guidance, nets, prompt)
        steps: Velocity = model
        if request.step_cache:
            steps = StepCache(model, request.step_cache)
        elif pipe.graphs:
            steps = pipe.graphs(model)
        return conditions.around(steps)

    # Encode the texts first: while a GPU encodes them, the host draws the noise.
    embeds = pipe.image_prompts.beside(embedded(request.prompts), request.images)
    start = pipe.latents.start(request, pipe.variant, sigmas[0])
    conditions = pipe.latents.conditions(request, pipe.variant)
    # The pass with the negative prompts uses the residuals of the positive pass, as in diffusers.
    tables = partial(pipe.position_tables, height=height, width=width)
    uses = pipe.controlnets.uses(request, pipe.latents)
    nets = Controls(uses, pipe.transformer, embeds, tables, timesteps, guidance) if uses else None
    positive = velocity(embeds)
    negative = velocity(embedded(request.negative_prompts), is_negative=True) if request.uses_cfg else None
    cfg_scale = on_device(torch.tensor(request.values("cfg_scale"), **HOST), pipe.device)
    kept = pipe.latents.kept(request, pipe.variant, start, sigmas)
    with pipe.attention.first():
        tokens = denoise(
            positive,
            pack(start.latents),
            sigmas,
            negative=negative,
            cfg_scale=cfg_scale,
            progress=progress_bar,
            after_step=after_each_step(kept, callback, pipe, sigmas),
        )
    return unpack(tokens, height, width)
