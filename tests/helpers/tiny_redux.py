"""A tiny FLUX.1-Redux with its vision tower, in the layout of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from transformers import SiglipVisionConfig, SiglipVisionModel

from helpers.parity import default_length
from helpers.tiny_flux import T5_WIDTH, TINY_TOWER

SIDE = 44
TOKENS = 9


def make_tiny_redux(folder: Path) -> Path:
    """Write `image_embedder` and `image_encoder` with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = SiglipVisionConfig(
            **TINY_TOWER,
            image_size=SIDE,
        )
        SiglipVisionModel(config).save_pretrained(folder / "image_encoder")
        ReduxImageEncoder(redux_dim=32, txt_in_features=T5_WIDTH).save_pretrained(folder / "image_embedder")
    return folder


def load_prior(folder: Path, reference: Any) -> Any:
    """Load diffusers' Redux prior with the text encoders of a pipeline."""
    from diffusers import FluxPriorReduxPipeline
    from transformers import SiglipImageProcessorPil

    prior: Any = FluxPriorReduxPipeline(
        image_encoder=SiglipVisionModel.from_pretrained(folder / "image_encoder"),
        feature_extractor=SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}),
        image_embedder=ReduxImageEncoder.from_pretrained(folder / "image_embedder"),
        text_encoder=reference.text_encoder,
        tokenizer=reference.tokenizer,
        text_encoder_2=reference.text_encoder_2,
        tokenizer_2=reference.tokenizer_2,
    )
    prior.set_progress_bar_config(disable=True)
    # The prior always asks for 512 tokens.
    encode, length = prior.encode_prompt, default_length(reference)
    prior.encode_prompt = lambda **given: encode(**given | {"max_sequence_length": length})
    return prior
