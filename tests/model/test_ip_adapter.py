"""IP-Adapters compared with golden numbers of diffusers."""

from __future__ import annotations

import pytest
import torch

from flux_batch.model.conditions.ip_adapter import IPAdapter, IPAdapterParams, ip_adapter_params
from flux_batch.model.sampling import position_ids
from flux_batch.model.transformer import Denoiser, Flux, ImagePrompt, PromptEmbeds
from helpers.golden import FLUX, check, filled, tensor

PARAMS = IPAdapterParams(embed_dim=32, num_tokens=4, token_dim=24, hidden_size=64, depth=2)


def test_xlabs_is_golden() -> None:
    base: Flux = filled(Flux(FLUX))
    adapter: IPAdapter = filled(IPAdapter(PARAMS))
    shapes = {name: tuple(value.shape) for name, value in adapter.state_dict().items()}
    assert ip_adapter_params(shapes) == PARAMS
    embeds = tensor("in.embed", (1, 32))[:, None]
    check(adapter.tokens(embeds), 0.902922, 76.801244, [1.778943, 0.532593, 1.228130], [-0.216749, -0.989132])
    text = PromptEmbeds(tensor("in.txt", (1, 7, 24)), tensor("in.vec", (1, 32)))
    pe, t, g = base.position_table(position_ids(7, 8, 12)), torch.tensor([0.7371]), torch.tensor([3.5])
    velocity = Denoiser(base, text, pe, t, g, prompt=adapter.prompt(embeds, 4, 0.8))(0, tensor("in.img", (1, 24, 64)))
    check(velocity, -1.640279, 1330.469307, [3.079867, -0.695612, -1.005398], [-1.974728, -1.654191])


@pytest.mark.compiled
@pytest.mark.long
def test_compiled_blocks_take_none_one_and_several() -> None:
    base: Flux = filled(Flux(FLUX))
    adapter: IPAdapter = filled(IPAdapter(PARAMS))
    one = adapter.prompt(tensor("in.embed", (1, 32))[:, None], 4)
    text = PromptEmbeds(tensor("in.txt", (1, 7, 24)), tensor("in.vec", (1, 32)))
    pe, t, g = base.position_table(position_ids(7, 8, 12)), torch.tensor([0.7371]), torch.tensor([3.5])

    def velocities() -> list[torch.Tensor]:
        prompts = None, one, ImagePrompt.joined([one, one])
        return [Denoiser(base, text, pe, t, g, prompt=each)(0, tensor("in.img", (1, 24, 64))) for each in prompts]

    plain = velocities()
    torch._dynamo.reset()
    base.double_blocks[0] = torch.compile(base.double_blocks[0], backend="eager", fullgraph=True)  # type: ignore
    torch.testing.assert_close(velocities(), plain, atol=1e-5, rtol=0)
    assert (plain[2] - plain[1]).abs().max() > 0.01


def test_published_adapters_have_their_numbers() -> None:
    for num_tokens, count in ((4, 490_874_880), (16, 528_672_768)):
        with torch.device("meta"):
            adapter = IPAdapter(
                IPAdapterParams(embed_dim=768, num_tokens=num_tokens, token_dim=4096, hidden_size=3072, depth=19)
            )
        assert sum(parameter.numel() for parameter in adapter.parameters()) == count
