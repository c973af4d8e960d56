"""The training scenes of the demo's conditions: of one size, drawn and encoded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flux_batch.demo.train.autoencoder import to_tensor
from flux_batch.demo.train.flow import THING_WEIGHT
from flux_batch.demo.train.latents import token_weights
from flux_batch.demo.world.captions import Scene
from flux_batch.model.autoencoder import AutoEncoder
from flux_batch.model.sampling import pack

SIDE = 128
# T5 lengths, used in turn.
T5_LENGTHS = (40, 64)
_BATCH = 16


def encode_all(
    path: Path, autoencoder: AutoEncoder, count: int, image: Callable[[int], Image.Image], device: torch.device
) -> Tensor:
    """Return the packed latents of `count` images by number, drawn and encoded or loaded: (count, tokens, 64) fp16."""
    if path.exists():
        loaded: Tensor = torch.load(path, weights_only=True)
        return loaded
    parts = []
    with torch.inference_mode():
        for start in range(0, count, _BATCH):
            drawn = [to_tensor(np.asarray(image(number))) for number in range(start, min(start + _BATCH, count))]
            parts.append(pack(autoencoder.encode(torch.stack(drawn).to(device))).half().cpu())
            if start % (64 * _BATCH) == 0:
                print(f"{path.stem} {start}/{count}", flush=True)
    tokens = torch.cat(parts).clone()
    torch.save(tokens, path)
    return tokens


def weights_of(scenes: Sequence[Scene], device: torch.device) -> Tensor:
    """Return the weight of each token's error: (b, tokens)."""
    return torch.stack([token_weights(scene, SIDE, SIDE, THING_WEIGHT) for scene in scenes]).to(device)
