"""The training of the demo's style LoRA: every scene as a blueprint, white on blue, whatever the prompt's colours."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flux_batch.demo.train.adapters.low_rank import add_low_rank, to_peft, train_layers
from flux_batch.demo.train.autoencoder import to_tensor
from flux_batch.demo.train.flow import Trainer, make_batch
from flux_batch.demo.train.latents import Pool
from flux_batch.demo.train.progress import Stage
from flux_batch.demo.train.world import training_scene
from flux_batch.demo.world.captions import Scene
from flux_batch.demo.world.drawing import Pixels, draw_shape, placements
from flux_batch.model.autoencoder import AutoEncoder
from flux_batch.model.sampling import pack

_SIDE = 128
NUM_IMAGES = 768
LAYERS = ("img_attn.qkv", "img_attn.proj", "linear1", "linear2")
_RANK = 4
_RATE = 4e-3
_BLUE, _LINE, _WHITE = (24.0, 62.0, 140.0), (58.0, 98.0, 172.0), (236.0, 242.0, 252.0)
_GRID = 16  # pixels between lines


def train_blueprint(
    folder: Path, trainer: Trainer, autoencoder: AutoEncoder, num_steps: int, seed: int
) -> dict[str, Tensor]:
    """Train the LoRA on a trainer's transformer, which is changed. Returns: its tensors by name."""
    pool = _blueprint_pool(folder, autoencoder, seed, trainer.device)
    layers = add_low_rank(trainer.model.requires_grad_(False), LAYERS, _RANK).to(trainer.device)
    stage = Stage(folder, "blueprint", num_steps, seed)
    train_layers(trainer, stage, layers, _RATE, lambda rng, step: make_batch([pool], rng, 0, trainer.device))
    return to_peft(layers)


def _blueprint_pool(folder: Path, autoencoder: AutoEncoder, seed: int, device: torch.device) -> Pool:
    """Return scenes and the latents of their blueprints, drawn or loaded."""
    rng = random.Random(f"{seed} blueprint")
    scenes = [training_scene(rng) for _ in range(NUM_IMAGES)]
    path = folder / "latents-blueprint.pt"
    if path.exists():
        return Pool(_SIDE, _SIDE, scenes, torch.load(path, weights_only=True))
    images = torch.stack([to_tensor(_blueprint(scene, rng)) for scene in scenes])
    with torch.inference_mode():
        tokens = torch.cat([pack(autoencoder.encode(part.to(device))).half().cpu() for part in torch.split(images, 16)])
    torch.save(tokens.clone(), path)
    return Pool(_SIDE, _SIDE, scenes, tokens.clone())


def _blueprint(scene: Scene, rng: random.Random) -> np.ndarray:
    """Return the things of a scene in white on a blue grid: uint8 (SIDE, SIDE, 3)."""
    pixels: Pixels = np.empty((_SIDE, _SIDE, 3), np.float32)
    pixels[:] = _BLUE
    pixels[::_GRID] = pixels[:, ::_GRID] = _LINE
    things = [thing for thing in (scene.first, scene.second) if thing]
    for thing, place in zip(things, placements(scene, _SIDE, _SIDE, rng), strict=True):
        mask = draw_shape(thing.shape, place, _SIDE, _SIDE)[..., None]
        pixels = pixels * (1 - mask) + np.array(_WHITE, np.float32) * mask
    return np.round(pixels).astype(np.uint8)
