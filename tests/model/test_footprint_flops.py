"""The floating-point operations of a step, compared with torch's count."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flux_batch.bench.pipeline.random_model import SIZES
from flux_batch.model.checkpoint.diffusers_keys import transformer_to_diffusers
from flux_batch.model.footprint import DEV_SIZE, step_flops, transformer_size
from flux_batch.model.params import DEV
from flux_batch.model.sampling import position_ids
from flux_batch.model.transformer import Flux


@pytest.mark.parametrize("guidance_embed", [True, False])
def test_the_formula_counts_what_torch_counts(guidance_embed: bool) -> None:
    params = replace(
        SIZES["tiny"].transformer, guidance_embed=guidance_embed, mlp_hidden_dim=192, depth_single_blocks=3
    )
    model = Flux(params).eval()
    last = model.single_blocks[-1]
    whole = last.forward
    last.forward = lambda x, modulation, pe, num_read: whole(x, modulation, pe, x.shape[1])[:, -num_read:]
    pe = model.position_table(position_ids(10, 8, 12))
    one = torch.ones(1)

    # The only attention kernel on the CPU whose operations torch counts.
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(
            torch.zeros(1, 24, params.in_channels),
            torch.zeros(1, 10, params.context_in_dim),
            pe,
            one,
            torch.zeros(1, params.vec_in_dim),
            one,
        )

    size = transformer_size({name: weight.shape for name, weight in model.named_parameters()})
    assert step_flops(size, 24, 10) == counter.get_total_flops()


@pytest.mark.parametrize(("pixels", "length", "tflop"), [(1024, 512, 74.385), (1024, 256, 69.47), (512, 512, 21.50)])
def test_flux_dev_takes_the_published_number_of_operations(pixels: int, length: int, tflop: float) -> None:
    assert step_flops(DEV_SIZE, (pixels // 16) ** 2, length) / 1e12 == pytest.approx(tflop, abs=0.01)


def test_the_size_of_dev_is_that_of_its_shapes_in_either_layout() -> None:
    with torch.device("meta"):
        model = Flux(DEV)
    assert transformer_size({name: weight.shape for name, weight in model.named_parameters()}) == DEV_SIZE

    tiny = Flux(SIZES["tiny"].transformer).state_dict()
    ours, theirs = (
        {name: tensor.shape for name, tensor in each.items()} for each in (tiny, transformer_to_diffusers(tiny))
    )
    assert transformer_size(ours) == transformer_size(theirs)
