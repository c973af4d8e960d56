"""The latents of drawn scenes, computed once and read at every training step."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flux_batch.demo.train.autoencoder import to_tensor
from flux_batch.demo.train.world import training_scene
from flux_batch.demo.world.captions import Scene
from flux_batch.demo.world.drawing import CENTRES, CENTRES_OF_PAIR, EXTENTS, JITTER, PAIR_DRIFT, draw
from flux_batch.model.autoencoder import AutoEncoder
from flux_batch.model.sampling import pack
from flux_batch.sampling_params import TOKEN_SIDE_PX

_BATCH = 16
# (width, height): share of all images and of all steps. Every size must be learned: at sizes with 2 to 4 % of the
# steps, half as many facts held as at the others.
SIZES: dict[tuple[int, int], float] = {
    (128, 128): 0.4,
    (192, 128): 0.12,
    (128, 192): 0.12,
    (160, 160): 0.12,
    (96, 96): 0.08,
    (160, 128): 0.04,
    (128, 160): 0.04,
    (144, 112): 0.04,
    (112, 144): 0.04,
}


@dataclass(frozen=True, slots=True)
class Pool:
    """Images of one size: their scenes, and their packed latents (n, tokens, 64) in fp16."""

    width: int
    height: int
    scenes: list[Scene]
    tokens: Tensor


def make_pools(folder: Path, autoencoder: AutoEncoder, count: int, seed: int, device: torch.device) -> list[Pool]:
    """Return `count` images in all sizes, drawn and encoded or loaded."""
    return [
        _make_pool(
            folder / f"latents-{width}x{height}.pt", autoencoder, width, height, round(count * share), seed, device
        )
        for (width, height), share in SIZES.items()
    ]


def _make_pool(
    path: Path, autoencoder: AutoEncoder, width: int, height: int, count: int, seed: int, device: torch.device
) -> Pool:
    """Return images of one size, drawn and encoded or loaded; seed, size and number determine each."""
    sources = [random.Random(f"{seed} {width}x{height} {number}") for number in range(count)]
    scenes = [training_scene(source) for source in sources]
    if path.exists():
        return Pool(width, height, scenes, torch.load(path, weights_only=True))
    parts = []
    with torch.inference_mode():
        for start in range(0, count, _BATCH):
            drawn = [
                to_tensor(np.asarray(draw(scene, width, height, source)))
                for scene, source in zip(scenes[start : start + _BATCH], sources[start : start + _BATCH], strict=True)
            ]
            images = torch.stack(drawn).to(device, memory_format=torch.channels_last)
            parts.append(pack(autoencoder.encode(images)).half().cpu())
            if start % (64 * _BATCH) == 0:
                print(f"latents {width}x{height} {start}/{count}", flush=True)
    tokens = torch.cat(parts).clone()
    torch.save(tokens, path)
    return Pool(width, height, scenes, tokens)


def token_weights(scene: Scene, width: int, height: int, thing_weight: float) -> Tensor:
    """Return the weight of each token's error: 1, or `thing_weight` where a thing may stand: (tokens,).

    The places follow from the caption, not from the image, so the optimal velocity for the weighted error is also
    optimal for the unweighted one.
    """
    weights = torch.ones(height // TOKEN_SIDE_PX, width // TOKEN_SIDE_PX)
    for left, top, right, bottom in thing_boxes(scene, width, height):
        rows = slice(int(max(top, 0) // TOKEN_SIDE_PX), int(bottom // TOKEN_SIDE_PX) + 1)
        columns = slice(int(max(left, 0) // TOKEN_SIDE_PX), int(right // TOKEN_SIDE_PX) + 1)
        weights[rows, columns] = thing_weight
    return weights.flatten()


def thing_boxes(scene: Scene, width: int, height: int) -> Iterator[tuple[float, float, float, float]]:
    """Yield the box in which each thing may be drawn: left, top, right and bottom in pixels."""
    drift_x = drift_y = 0.0
    if scene.relation is None or scene.second is None:
        assert scene.position is not None
        places = [(CENTRES[scene.position], scene.first)]
    else:
        places = list(zip(CENTRES_OF_PAIR[scene.relation], (scene.first, scene.second), strict=True))
        drift_x, drift_y = (0.0, PAIR_DRIFT) if scene.relation in ("left of", "right of") else (PAIR_DRIFT, 0.0)
    for (x, y), thing in places:
        half = EXTENTS[thing.size] * min(width, height) / 2
        across, down = half + (JITTER + drift_x) * width, half + (JITTER + drift_y) * height
        yield x * width - across, y * height - down, x * width + across, y * height + down
