"""The targets of the head follow from the scene, and its gradient reaches the transformer."""

from __future__ import annotations

import torch

from flux_batch.demo.train.auxiliary_head import BLOCK, AuxiliaryHead, token_classes
from flux_batch.demo.train.parts import TRANSFORMER
from flux_batch.demo.world.captions import COLOURS, SHAPES, SIZES, Background, Scene, Thing
from flux_batch.model.transformer import Flux

WHITE = Background(texture="plain", colour="white")
STAR = Thing(shape="star", colour="red", size="small")
RING = Thing(shape="ring", colour="blue", size="large")


def answer(thing: Thing) -> list[int]:
    return [1 + SHAPES.index(thing.shape), 1 + COLOURS.index(thing.colour), 1 + SIZES.index(thing.size)]


def test_tokens_show_the_thing_that_may_stand_there() -> None:
    answers = token_classes(Scene(first=STAR, position="top left", background=WHITE), 128, 128).reshape(8, 8, 3)

    assert answers[1, 1].tolist() == answers[2, 2].tolist() == answer(STAR)
    assert not answers[4:].any()
    assert not answers[:, 4:].any()


def test_each_of_two_things_has_its_side() -> None:
    scene = Scene(first=STAR, relation="right of", second=RING, background=WHITE)
    answers = token_classes(scene, 128, 96).reshape(6, 8, 3)

    assert answers[3, 1].tolist() == answer(RING)
    assert answers[3, 5].tolist() == answer(STAR)
    assert not answers[0].any()


def test_the_loss_has_gradients_up_to_the_hooked_block() -> None:
    torch.manual_seed(0)
    model = Flux(TRANSFORMER)
    head = AuxiliaryHead(model)
    ids = torch.zeros(2 + 4, 3)
    model(
        torch.randn(1, 4, 64),
        torch.randn(1, 2, TRANSFORMER.context_in_dim),
        model.position_table(ids),
        torch.tensor([1.0]),
        torch.randn(1, TRANSFORMER.vec_in_dim),
        torch.tensor([3.5]),
    )
    head.loss(torch.zeros(1, 4, 3, dtype=torch.long), torch.ones(1, 4)).backward()

    taught = [block.linear1.weight.grad is not None for block in model.single_blocks]
    assert taught == [number <= BLOCK for number in range(len(taught))]
