"""The training of the demo's editing LoRA: a reference's tokens before the image's, as FLUX.1-Kontext reads them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from flux_batch.demo.train.adapters.low_rank import add_conditioning, to_original, train_layers
from flux_batch.demo.train.adapters.scenes import SIDE, T5_LENGTHS, encode_all
from flux_batch.demo.train.flow import TrainBatch, Trainer
from flux_batch.demo.train.progress import Stage
from flux_batch.demo.train.world import training_scene
from flux_batch.demo.world.captions import Scene, is_held_out, pick
from flux_batch.demo.world.drawing import draw
from flux_batch.demo.world.edits import Change, changed, instruct
from flux_batch.model.autoencoder import AutoEncoder

# Each scene comes with two changes of it; an edit leads from any of the three to another one that differs by one fact.
NUM_SCENES = 2048
IMAGES_A_STEP = 16
_RANK = 24
_RATE = 2e-3
# Shapes are learned last, so every second change is one of shape.
_CHANGES: tuple[Change, ...] = ("colour", "shape", "background", "shape")


class _Pool(NamedTuple):
    """Groups of a scene and two changes of it.

    images: the tokens of all in this order: (3 n, tokens, 64).
    """

    groups: list[tuple[Scene, Scene, Scene]]
    images: Tensor


def train_kontext(
    folder: Path, trainer: Trainer, autoencoder: AutoEncoder, num_steps: int, seed: int
) -> dict[str, Tensor]:
    """Train the LoRA on a trainer's transformer, which is changed. Returns: its tensors by name."""
    pool = _make_pool(folder, autoencoder, NUM_SCENES, seed, trainer.device)
    layers = add_conditioning(trainer.model.requires_grad_(False), _RANK).to(trainer.device)
    stage = Stage(folder, "kontext", num_steps, seed)
    train_layers(trainer, stage, layers, _RATE, lambda rng, step: _make_batch(pool, rng, step, trainer.device))
    return to_original(layers)


def _make_batch(pool: _Pool, rng: random.Random, step: int, device: torch.device) -> TrainBatch:
    """Return a random batch of edits: to a change of a scene, or back."""
    sources, targets, prompts = [], [], []
    for _ in range(IMAGES_A_STEP):
        group = int(rng.random() * len(pool.groups))
        ends = [0, 1 + int(2 * rng.random())]
        if rng.random() < 0.5:
            ends.reverse()
        before, after = (pool.groups[group][end] for end in ends)
        source, target = (3 * group + end for end in ends)
        sources.append(source)
        targets.append(target)
        prompts.append(instruct(before, after, rng))
    reference, clean = (pool.images[numbers].float().to(device) for numbers in (sources, targets))
    return TrainBatch(
        clean=clean,
        weights=_weights(reference, clean),
        prompts=prompts,
        length=T5_LENGTHS[step % len(T5_LENGTHS)],
        width=SIDE,
        height=SIDE,
        reference=reference,
    )


def _weights(before: Tensor, after: Tensor) -> Tensor:
    """Return the weight of each token's error (b, tokens): half of an image's weight is on the changed tokens.

    Most of an image stays unchanged, and copying it is learned soon.
    """
    difference = (after - before).square().mean(dim=-1)
    return 1 / difference.shape[1] + difference / difference.sum(dim=1, keepdim=True)


def _make_pool(folder: Path, autoencoder: AutoEncoder, count: int, seed: int, device: torch.device) -> _Pool:
    """Return groups of scenes and the tokens of their images, drawn or loaded."""
    groups = [_make_group(random.Random(f"{seed} kontext {number}")) for number in range(count)]

    def image(number: int) -> Image.Image:
        # The same random source for all of a group, so that unchanged parts are drawn alike.
        return draw(groups[number // 3][number % 3], SIDE, SIDE, random.Random(f"{seed} kontext drawing {number // 3}"))

    return _Pool(groups, encode_all(folder / "latents-kontext.pt", autoencoder, 3 * count, image, device))


def _make_group(rng: random.Random) -> tuple[Scene, Scene, Scene]:
    """Return a scene of one thing and two changes of it, none held out."""
    while True:
        scene = training_scene(rng)
        if scene.second:
            continue
        tried = [changed(scene, pick(rng, _CHANGES), rng) for _ in range(6)]
        changes = [after for after in tried if after and not is_held_out(after)]
        if len(changes) >= 2 and changes[0] != changes[1]:
            return scene, changes[0], changes[1]
