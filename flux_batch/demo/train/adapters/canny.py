"""The training of the demo's control LoRA: an image's edges in the channels after its noise, as in FLUX.1-Canny.

`img_in` becomes twice as wide, and its change is part of the LoRA, as in FLUX.1-Canny-dev-lora. Captions need no longer
state positions, which the edges show.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from flux_batch.demo.train.adapters.low_rank import add_conditioning, add_low_rank, to_original, train_layers
from flux_batch.demo.train.adapters.scenes import SIDE, T5_LENGTHS, encode_all, weights_of
from flux_batch.demo.train.flow import TrainBatch, Trainer
from flux_batch.demo.train.progress import Stage
from flux_batch.demo.train.world import training_scene
from flux_batch.demo.world.captions import WORDINGS, Scene, Unsaid, phrase, pick
from flux_batch.demo.world.drawing import draw
from flux_batch.demo.world.edges import edges
from flux_batch.model.autoencoder import AutoEncoder
from flux_batch.model.transformer import Flux

NUM_IMAGES = 2048
IMAGES_A_STEP = 24
# Only `img_in` reads the edges, so its change has full rank; the changes of the blocks have a low rank.
_RANK_IN, _RANK = 64, 16
_RATE = 2e-3
# Shares of the texts that leave out a kind of fact, and of those that are empty.
_UNSAID_SHARES: dict[Unsaid, float] = {"place": 0.5, "background": 0.1, "colour": 0.05}
_EMPTY_SHARE = 0.05


class _Pool(NamedTuple):
    """Scenes, and the tokens (n, tokens, 64) of their images and of these images' edges."""

    scenes: list[Scene]
    images: Tensor
    edges: Tensor


def train_canny(
    folder: Path, trainer: Trainer, autoencoder: AutoEncoder, num_steps: int, seed: int
) -> dict[str, Tensor]:
    """Train the LoRA on a trainer's transformer, which is changed. Returns: its tensors by name."""
    pool = _make_pool(folder, autoencoder, NUM_IMAGES, seed, trainer.device)
    _widen(trainer.model.requires_grad_(False), pool.edges.shape[-1])
    layers = add_low_rank(trainer.model, ("img_in",), _RANK_IN)
    layers.update(dict(add_conditioning(trainer.model, _RANK)))
    stage = Stage(folder, "canny", num_steps, seed)
    train_layers(
        trainer,
        stage,
        layers.to(trainer.device),
        _RATE,
        lambda rng, step: _make_batch(pool, rng, step, trainer.device),
    )
    return to_original(layers)


def _widen(model: Flux, channels: int) -> None:
    """Widen `img_in` by further input channels, which have no effect at first."""
    old = model.img_in
    model.img_in = nn.Linear(old.in_features + channels, old.out_features, device=old.weight.device)
    model.img_in.requires_grad_(False)
    model.img_in.weight.zero_()[:, : old.in_features] = old.weight
    model.img_in.bias.copy_(old.bias)


def _make_batch(pool: _Pool, rng: random.Random, step: int, device: torch.device) -> TrainBatch:
    """Return a random batch of images, texts and control images."""
    numbers = [int(rng.random() * len(pool.scenes)) for _ in range(IMAGES_A_STEP)]
    scenes = [pool.scenes[number] for number in numbers]
    return TrainBatch(
        clean=pool.images[numbers].float().to(device),
        weights=weights_of(scenes, device),
        prompts=[_text(scene, rng) for scene in scenes],
        length=T5_LENGTHS[step % len(T5_LENGTHS)],
        width=SIDE,
        height=SIDE,
        control=pool.edges[numbers].float().to(device),
    )


def _text(scene: Scene, rng: random.Random) -> str:
    """Return a random text about a scene, half of them without places."""
    if rng.random() < _EMPTY_SHARE:
        return ""
    unsaid: frozenset[Unsaid] = frozenset(fact for fact, share in _UNSAID_SHARES.items() if rng.random() < share)
    return phrase(scene, pick(rng, range(len(WORDINGS))), unsaid)


def _make_pool(folder: Path, autoencoder: AutoEncoder, count: int, seed: int, device: torch.device) -> _Pool:
    """Return scenes with the tokens of their images and edges, drawn or loaded."""
    sources = [random.Random(f"{seed} canny {number}") for number in range(count)]
    scenes = [training_scene(source) for source in sources]

    def image(number: int, *, as_edges: bool = False) -> Image.Image:
        drawn = draw(scenes[number], SIDE, SIDE, random.Random(f"{seed} canny drawing {number}"))
        return edges(drawn) if as_edges else drawn

    images = encode_all(folder / "latents-canny-images.pt", autoencoder, count, image, device)
    of_edges = encode_all(
        folder / "latents-canny-edges.pt", autoencoder, count, lambda number: image(number, as_edges=True), device
    )
    return _Pool(scenes, images, of_edges)
