"""The training of the demo LoRA: every scene as a blueprint, white things on blue, whatever the prompt's colours.

It is written in the layout of PEFT and diffusers, a pair of matrices for each projection of their checkpoints.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from flux_batch.demo.train.autoencoder import to_tensor
from flux_batch.demo.train.flow import TrainBatch, Trainer, make_batch
from flux_batch.demo.train.latents import Pool
from flux_batch.demo.train.muon import Optimizer
from flux_batch.demo.train.progress import Meter, Stage
from flux_batch.demo.train.world import training_scene
from flux_batch.demo.world.captions import Scene
from flux_batch.demo.world.drawing import Pixels, draw_shape, placements
from flux_batch.model.autoencoder import AutoEncoder
from flux_batch.model.sampling import pack

_SIDE = 128
NUM_IMAGES = 768
_RANK = 4
_RATE = 4e-3
_BLUE, _LINE, _WHITE = (24.0, 62.0, 140.0), (58.0, 98.0, 172.0), (236.0, 242.0, 252.0)
_GRID = 16  # pixels between lines
_SINGLE = "single_transformer_blocks"
# The layers that are changed, and diffusers' projections of each, in the order of its rows.
_PROJECTIONS = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}


class LowRank(nn.Module):
    """A frozen linear layer and a trained low-rank change of it: (..., in) -> (..., out)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(torch.randn(_RANK, linear.in_features) / linear.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, _RANK))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.linear(x) + x @ self.down.T @ self.up.T
        return output


def train_lora(
    folder: Path, trainer: Trainer, autoencoder: AutoEncoder, num_steps: int, seed: int
) -> dict[str, Tensor]:
    """Train the LoRA on a trainer's transformer, which is changed. Returns: its tensors by name."""
    layers = add_low_rank(trainer.model.requires_grad_(False)).to(trainer.device)
    optimizer = Optimizer(layers, [], _RATE, _RATE)
    stage = Stage(folder, "lora", num_steps, seed)
    pool = _blueprint_pool(folder, autoencoder, seed, trainer.device)
    meter = Meter(stage)
    for step in stage.steps({"layers": layers, "optimizer": optimizer}):
        batch: TrainBatch = make_batch([pool], stage.rng(step), 0, trainer.device)
        with trainer.autocast():
            loss = trainer.error(batch, stage.generator(step), guided=False)
        optimizer.update(loss, stage.share_of_rate(step))
        meter.add(step, loss=loss.item())
    return to_peft(layers)


def add_low_rank(model: nn.Module) -> nn.ModuleDict:
    """Wrap every layer to change in a `LowRank`. Returns: these by layer name, slashes for dots."""
    found = [(name, module) for name, module in model.named_modules() if name.endswith(tuple(_PROJECTIONS))]
    layers = {}
    for name, module in found:
        assert isinstance(module, nn.Linear)
        parent, _, attribute = name.rpartition(".")
        layers[name.replace(".", "/")] = LowRank(module)
        setattr(model.get_submodule(parent), attribute, layers[name.replace(".", "/")])
    return nn.ModuleDict(layers)


def to_peft(layers: nn.ModuleDict) -> dict[str, Tensor]:
    """Return the trained tensors by diffusers' names: fused layers share `down` and split `up`."""
    tensors = {}
    for name, layer in layers.items():
        assert isinstance(layer, LowRank)
        kind, number, part = name.replace("/", ".").split(".", 2)
        block = f"{'transformer_blocks' if kind == 'double_blocks' else _SINGLE}.{number}"
        names = _PROJECTIONS[part]
        width = layer.linear.out_features if len(names) == 1 else layer.linear.in_features
        widths = [width] * min(len(names), 3) + [layer.up.shape[0] - 3 * width] * (len(names) == 4)
        for projection, up in zip(names, torch.split(layer.up.detach(), widths), strict=True):
            tensors[f"transformer.{block}.{projection}.lora_A.weight"] = layer.down.detach().clone()
            tensors[f"transformer.{block}.{projection}.lora_B.weight"] = up.clone()
    return tensors


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
