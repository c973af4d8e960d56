"""The peer of the benchmarks: diffusers' FluxPipeline on the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from flux_batch.errors import JobError
from flux_batch.model.checkpoint.diffusers_keys import (
    autoencoder_config,
    autoencoder_to_diffusers,
    scheduler_config,
    transformer_config,
    transformer_to_diffusers,
)
from flux_batch.model.params import FluxParams
from flux_batch.model.text.clip import ClipModel
from flux_batch.model.text.t5 import T5Model
from flux_batch.pipeline.model_manager import ModelManager
from flux_batch.pipeline.pipeline import FluxImagePipeline

_State = Mapping[str, torch.Tensor]


class Peer:
    """diffusers' pipeline, eager or with compiled blocks; it shares most weights with ours."""

    def __init__(self, name: str, *, compiled: bool = False) -> None:
        self.name = name
        self._compiled = compiled
        self._states: tuple[_State, _State] | None = None
        self._pipeline: Any = None

    def keep(self, manager: ModelManager) -> None:
        """Keep the weights as they were loaded. Raises: JobError for weights in fp8."""
        if manager.quantization != "none":
            raise JobError(f"--against {self.name}: needs the weights as they are; leave out --quantization")
        assert manager.transformer is not None
        assert manager.autoencoder is not None
        self._states = (dict(manager.transformer.state_dict()), dict(manager.autoencoder.state_dict()))

    def open(self, pipeline: FluxImagePipeline) -> None:
        """Build diffusers' pipeline from the kept weights and those of our text encoders."""
        assert self._states is not None
        transformer, autoencoder = self._states
        # In a float16 model our autoencoder is float32; diffusers decodes in the dtype of the latents.
        autoencoder = {name: tensor.to(pipeline.torch_dtype) for name, tensor in autoencoder.items()}
        self._pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**scheduler_config(pipeline.schedule)),
            vae=_loaded(
                AutoencoderKL, autoencoder_config(pipeline.autoencoder.params), autoencoder_to_diffusers(autoencoder)
            ),
            text_encoder=_clip(pipeline.clip.model),
            tokenizer=pipeline.clip.tokenizer,
            text_encoder_2=_t5(pipeline.t5.model),
            tokenizer_2=pipeline.t5.tokenizer,
            transformer=_loaded(
                FluxTransformer2DModel,
                _transformer_arguments(pipeline.transformer.params),
                transformer_to_diffusers(transformer),
            ),
        )
        self._pipeline.set_progress_bar_config(disable=True)
        self._length = pipeline.default_t5_sequence_length
        self._states = None
        if self._compiled:
            self._pipeline.transformer.compile_repeated_blocks(fullgraph=True)

    def __call__(self, arguments: Mapping[str, Any]) -> list[Any]:
        """Return the images, uint8 (h w 3) each, for the arguments of our pipeline."""
        images = self._pipeline(
            prompt=list(arguments["prompt"]),
            width=arguments["width"],
            height=arguments["height"],
            num_inference_steps=arguments["num_inference_steps"],
            guidance_scale=arguments["embedded_guidance"],
            max_sequence_length=arguments["t5_sequence_length"] or self._length,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in arguments["seed"]],
            output_type="pil",
        ).images
        return [np.asarray(image) for image in images]


def _clip(model: ClipModel) -> CLIPTextModel:
    """Return the CLIP of transformers with the weights of ours."""
    theirs = _loaded(CLIPTextModel, {"config": CLIPTextConfig(**asdict(model.params))}, model.state_dict())
    device = model.final_layer_norm.weight.device
    theirs.embeddings.position_ids = torch.arange(model.params.max_position_embeddings, device=device)[None]
    return theirs


def _t5(model: T5Model) -> T5EncoderModel:
    """Return the T5 of transformers with the weights of ours."""
    config = T5Config(**asdict(model.params), tie_word_embeddings=False)
    table = {"encoder.embed_tokens.weight": model.shared.weight}
    return _loaded(T5EncoderModel, {"config": config}, {**model.state_dict(), **table})


def _loaded(kind: Any, config: Mapping[str, Any], state: _State) -> Any:
    """Return a model of diffusers or transformers with existing tensors, copied only if not contiguous."""
    with torch.device("meta"):
        model = kind(**config)
    model.load_state_dict({name: tensor.contiguous() for name, tensor in state.items()}, assign=True)
    return model.requires_grad_(False).eval()


def _transformer_arguments(params: FluxParams) -> dict[str, Any]:
    """Return diffusers' arguments of a transformer. Raises: JobError for one that it cannot build."""
    if params.mlp_hidden_dim != 4 * params.hidden_size or not params.qkv_bias:
        raise JobError("--against: diffusers has no transformer of this shape")
    return transformer_config(params) | {"out_channels": params.out_channels}
