"""Low-rank changes of a transformer's layers, their training, and their names in a file: diffusers' or the original.

Muon trains them, since it moves all directions of a factor alike. With AdamW nearly the whole change lay in one
direction: in the first layer of the editing LoRA, of rank 24, the largest singular value was 8.5 after 390 steps, the
eighth 0.4.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from flux_batch.demo.train.flow import TrainBatch, Trainer
from flux_batch.demo.train.muon import MIN_SIDE, Optimizer
from flux_batch.demo.train.progress import Meter, Stage
from flux_batch.model.layers import RMSNorm
from flux_batch.model.transformer import Flux

# The peak rate of factors with Muon. The editing LoRA's error was 0.23 with it after 730 steps, and 0.30 with three
# times this rate after 610.
_FACTOR_RATE = 1e-2
# All layers of blocks except modulation.
_LAYERS = ("attn.qkv", "attn.proj", "mlp.0", "mlp.2", "linear1", "linear2")
# diffusers' projections of layers, in the order of their rows.
_PROJECTIONS = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}
_SINGLE = "single_transformer_blocks"


class LowRank(nn.Module):
    """A frozen linear layer and a trained low-rank change of it: (..., in) -> (..., out).

    bias: whether its bias changes, too.
    """

    def __init__(self, linear: nn.Linear, rank: int, *, bias: bool = False) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) / linear.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.bias = nn.Parameter(torch.zeros(linear.out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.linear(x) + nn.functional.linear(x @ self.down.T, self.up, self.bias)
        return output


def train_layers(
    trainer: Trainer,
    stage: Stage,
    layers: nn.ModuleDict,
    rate: float,
    make_batch: Callable[[random.Random, int], TrainBatch],
) -> None:
    """Train layers of a trainer's transformer: factors of at least `MIN_SIDE` by Muon, all else by AdamW.

    rate: the peak learning rate of AdamW; make_batch: the batch of a step, from its random source and its number.
    """
    factors = [p for p in layers.parameters() if p.requires_grad and p.ndim == 2 and min(p.shape) >= MIN_SIDE]
    optimizer = Optimizer(layers, factors, _FACTOR_RATE, rate)
    meter = Meter(stage)
    for step in stage.steps({"layers": layers, "optimizer": optimizer}):
        batch = make_batch(stage.rng(step), step)
        with trainer.autocast():
            # Train at guidance 1 only: the velocity of the data would undo what the base has learned of others.
            loss = trainer.error(batch, stage.generator(step), guided=False, max_guidance=1.0)
        optimizer.update(loss, stage.share_of_rate(step))
        meter.add(step, loss=loss.item())


def add_low_rank(model: nn.Module, names: Sequence[str], rank: int, *, bias: bool = False) -> nn.ModuleDict:
    """Wrap every layer whose name ends in one of `names` in a `LowRank`. Returns: the wrappers by name, / for dots."""
    found = [(name, module) for name, module in model.named_modules() if name.endswith(tuple(names))]
    layers = {}
    for name, module in found:
        assert isinstance(module, nn.Linear)
        parent, _, attribute = name.rpartition(".")
        layers[name.replace(".", "/")] = LowRank(module, rank, bias=bias)
        setattr(model.get_submodule(parent), attribute, layers[name.replace(".", "/")])
    return nn.ModuleDict(layers)


def add_conditioning(model: Flux, rank: int) -> nn.ModuleDict:
    """Wrap all layers of the blocks, as BFL's control LoRAs do.

    Weights change at a low rank, biases and norm scales fully. Returns: the wrappers by name, / for dots.
    """
    layers = add_low_rank(model, _LAYERS, rank, bias=True)
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            layers[name.replace(".", "/")] = module.requires_grad_()
    return layers


def to_original(layers: nn.ModuleDict) -> dict[str, Tensor]:
    """Return the trained tensors by the names of BFL's control LoRAs: of the original layers, norms by their scale."""
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        key = name.replace("/", ".")
        if isinstance(layer, LowRank):
            tensors |= {f"{key}.lora_A.weight": layer.down, f"{key}.lora_B.weight": layer.up}
            tensors |= {} if layer.bias is None else {f"{key}.lora_B.bias": layer.bias}
        else:
            assert isinstance(layer, RMSNorm)
            tensors[f"{key}.scale"] = layer.scale
    return {key: tensor.detach().clone() for key, tensor in tensors.items()}


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
