"""A transformer with fixed texts and steps: the same velocities, with most modulation computed once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flux_batch.model.params import SCHNELL_SCHEDULE
from flux_batch.model.sampling import denoise, make_sigmas, position_ids, timesteps_of
from flux_batch.model.transformer import Denoiser, Flux, Modulations, PromptEmbeds, position_tables
from helpers.golden import FLUX, filled
from helpers.three_images import GUIDANCE, NOISE, TEXT, denoiser

STEPS = 7
SIGMAS = make_sigmas(STEPS, 24, SCHNELL_SCHEDULE)
TIMESTEPS = timesteps_of(SIGMAS, GUIDANCE)


@pytest.fixture(scope="module")
def model() -> Flux:
    return filled(Flux(FLUX))


def make(model: Flux) -> Denoiser:
    return denoiser(model, SIGMAS)


@pytest.mark.parametrize("rows", [1, 6, 64])
def test_each_step_is_that_of_the_model(model: Flux, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(model, "modulation_rows", rows)
    velocity = make(model)
    for step in (*range(STEPS), 2, 6, 0):  # in any order, since steps need not come in turn
        expected = model(
            NOISE, TEXT.prompt_embeds, velocity.pe, TIMESTEPS[step].expand(3), TEXT.pooled_prompt_embeds, GUIDANCE
        )
        torch.testing.assert_close(velocity(step, NOISE), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("rows", "groups"), [(1, [3] * 7), (6, [6, 6, 6, 3]), (8, [6, 6, 6, 3]), (64, [21])])
def test_modulation_is_computed_for_some_steps_at_once(rows: int, groups: list[int]) -> None:
    made: list[int] = []

    class Watched(Flux):
        def modulations(self, vec: Tensor) -> Modulations:
            made.append(len(vec))
            return super().modulations(vec)

    model = filled(Watched(FLUX))
    model.modulation_rows = rows
    velocity = make(model)
    for step in range(STEPS):
        velocity(step, NOISE)
    assert made == groups


def test_a_model_without_guidance_takes_none() -> None:
    params: dict[str, Any] = {name: getattr(FLUX, name) for name in FLUX.__dataclass_fields__}
    model = filled(Flux(type(FLUX)(**{**params, "guidance_embed": False})))
    pe = model.position_table(position_ids(7, 8, 12))
    velocity = Denoiser(model, TEXT, pe, TIMESTEPS)
    expected = model(NOISE, TEXT.prompt_embeds, pe, TIMESTEPS[3].expand(3), TEXT.pooled_prompt_embeds)
    torch.testing.assert_close(velocity(3, NOISE), expected, rtol=0, atol=2e-5)


class Travels(TorchDispatchMode):
    """Records operations that copy more than one number between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        if len({tensor.device for tensor in tensors if tensor.ndim}) > 1:
            self.found.append(str(func))
        return result


@pytest.mark.parametrize("rows", [1, 64])
def test_the_loop_neither_reads_from_the_device_nor_sends_to_it(rows: int) -> None:
    """Either would make the host wait. On the meta device, which has no data, reading a number raises."""
    with torch.device("meta"):
        model = Flux(FLUX)
    model.modulation_rows = rows
    pe = model.position_table(position_ids(7, 8, 12).to("meta"))
    text = PromptEmbeds(*(part.to("meta") for part in TEXT))
    img, timesteps, guidance = (each.to("meta") for each in (NOISE, TIMESTEPS[-3:], GUIDANCE))
    velocity, negative = (Denoiser(model, text, pe, timesteps, guidance) for _ in range(2))
    with torch.inference_mode(), Travels() as travels:
        denoise(velocity, img, SIGMAS[-4:], negative=negative, cfg_scale=guidance)
        assert not travels.found
        torch.ones(2).to("meta")
        assert travels.found
    with pytest.raises(RuntimeError, match="meta"):
        img.sum().item()


def test_a_position_table_is_that_of_the_model_and_made_once(model: Flux) -> None:
    tables = position_tables(model, torch.device("cpu"))
    for size in ((7, 8, 12), (7, 12, 8), (9, 8, 12)):
        table = tables(*size)
        assert torch.equal(table, model.position_table(position_ids(*size)))
        assert tables(*size) is table


def test_the_position_table_used_longest_ago_is_forgotten(model: Flux, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    table = model.position_table

    def counted(ids: Tensor) -> Tensor:
        made.append(len(ids) - 1)
        return table(ids)

    monkeypatch.setattr(model, "position_table", counted)
    tables = position_tables(model, torch.device("cpu"), max_tables=2)
    for length in (1, 2, 1, 3, 1, 2):
        tables(length, 2, 2)
    assert made == [1, 2, 3, 2]
