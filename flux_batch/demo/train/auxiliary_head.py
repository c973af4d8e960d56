"""An auxiliary head that classifies the thing at each image token, in training.

A thing covers few pixels, and its shape affects few of those, so the error of the velocity hardly shows whether the
prompt was understood. The head, on a middle layer of the transformer, must predict shape, colour and size at each
token, which gives a signal from the first step and does not change the optimal velocity. It is dropped after training.
The idea is that of REPA (arXiv:2410.06940), with the facts of the scene in place of another network's features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flux_batch.demo.train.latents import thing_boxes
from flux_batch.demo.world.captions import COLOURS, SHAPES, SIZES, Scene
from flux_batch.model.transformer import Flux
from flux_batch.sampling_params import TOKEN_SIDE_PX

# The single block that feeds the head: after it, each image token has attended to the text at least twice.
BLOCK = 1
# Classes of shape, colour and size; the first of each is `no thing`.
_NUM_CLASSES = (1 + len(SHAPES), 1 + len(COLOURS), 1 + len(SIZES))
_NOTHING = (0, 0, 0)


class AuxiliaryHead(nn.Module):
    """The head, and the last output of the layer to which it is hooked: (b, tokens, hidden)."""

    def __init__(self, model: Flux) -> None:
        super().__init__()
        hidden = model.params.hidden_size
        self.head = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, sum(_NUM_CLASSES)))
        self.states: Tensor | None = None
        model.single_blocks[BLOCK].register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.states = output

    def loss(self, classes: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted mean cross entropy of the head: classes (b, n, 3), weights (b, n)."""
        assert self.states is not None
        logits = self.head(self.states[:, -classes.shape[1] :]).float().split(_NUM_CLASSES, dim=-1)
        self.states = None
        errors = [
            nn.functional.cross_entropy(part.flatten(0, 1), classes[..., fact].flatten(), reduction="none")
            for fact, part in enumerate(logits)
        ]
        return (torch.stack(errors).sum(dim=0) * weights.flatten()).sum() / weights.sum()


def token_classes(scene: Scene, width: int, height: int) -> Tensor:
    """Return the classes of the thing that the caption puts at each token: shape, colour, size: (tokens, 3)."""
    things = [thing for thing in (scene.first, scene.second) if thing]
    boxes = list(thing_boxes(scene, width, height))
    rows = []
    for top in range(0, height, TOKEN_SIDE_PX):
        for left in range(0, width, TOKEN_SIDE_PX):
            near: dict[float, tuple[int, ...]] = {}
            for thing, box in zip(things, boxes, strict=True):
                if box[0] < left + TOKEN_SIDE_PX and left <= box[2] and box[1] < top + TOKEN_SIDE_PX and top <= box[3]:
                    middle = ((box[0] + box[2] - TOKEN_SIDE_PX) / 2, (box[1] + box[3] - TOKEN_SIDE_PX) / 2)
                    near[math.dist((left, top), middle)] = (
                        1 + SHAPES.index(thing.shape),
                        1 + COLOURS.index(thing.colour),
                        1 + SIZES.index(thing.size),
                    )
            rows.append(near[min(near)] if near else _NOTHING)
    return torch.tensor(rows)
