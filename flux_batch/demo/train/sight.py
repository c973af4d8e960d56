"""Asks a layer in the middle of the transformer what stands at each image token, while it is trained.

A thing covers few pixels, and its shape changes few of those: the error of the velocity hardly shows whether the words
were understood. A small head that must name the shape, colour and size at each token shows it from the first step, and
leaves the velocity that is best as it was. It is thrown away when training ends. The idea is that of REPA
(arXiv:2410.06940), with the facts of the scene in place of another network's features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flux_batch.demo.train.latents import thing_boxes
from flux_batch.demo.world.captions import COLOURS, SHAPES, SIZES, Scene
from flux_batch.model.transformer import Flux
from flux_batch.sampling_params import TOKEN_SIDE_PX

# The single block whose image tokens are asked: all that look at the text have by then done so twice or more.
BLOCK = 1
# Answers to each question; the first of each is `nothing stands here`.
NUM_ANSWERS = (1 + len(SHAPES), 1 + len(COLOURS), 1 + len(SIZES))
NOTHING = (0, 0, 0)


class Sight(nn.Module):
    """The head, and what the layer last made: it watches a transformer from when it is made."""

    def __init__(self, model: Flux) -> None:
        super().__init__()
        hidden = model.params.hidden_size
        self.head = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, sum(NUM_ANSWERS)))
        self.seen: Tensor | None = None
        model.single_blocks[BLOCK].register_forward_hook(self._see)

    def _see(self, block: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        self.seen = made

    def loss(self, answers: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted mean cross entropy at the watched layer: answers (b, n, 3), weights (b, n)."""
        assert self.seen is not None
        told = self.head(self.seen[:, -answers.shape[1] :]).float().split(NUM_ANSWERS, dim=-1)
        self.seen = None
        errors = [
            nn.functional.cross_entropy(logits.flatten(0, 1), answers[..., question].flatten(), reduction="none")
            for question, logits in enumerate(told)
        ]
        return (torch.stack(errors).sum(dim=0) * weights.flatten()).sum() / weights.sum()


def token_answers(scene: Scene, width: int, height: int) -> Tensor:
    """Return what may stand at each token, as the caption says: (tokens, 3) places in shapes, colours and sizes."""
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
            rows.append(near[min(near)] if near else NOTHING)
    return torch.tensor(rows)
