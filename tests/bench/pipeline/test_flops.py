from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flux_batch.bench.pipeline.flops import peak_tflops, step_flops, utilisation
from flux_batch.bench.pipeline.random_model import SIZES
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
    last.forward = lambda x, modulation, pe, read: whole(x, modulation, pe, x.shape[1])[:, -read:]
    pe = model.position_table(position_ids(10, 8, 12))
    one = torch.ones(1)

    # The one way to attend on the CPU that torch counts.
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(
            torch.zeros(1, 24, params.in_channels),
            torch.zeros(1, 10, params.context_in_dim),
            pe,
            one,
            torch.zeros(1, params.vec_in_dim),
            one,
        )

    assert step_flops(params, 24, 10) == counter.get_total_flops()


@pytest.mark.parametrize(("pixels", "length", "tflop"), [(1024, 512, 74.385), (1024, 256, 69.47), (512, 512, 21.50)])
def test_flux_dev_takes_the_published_number(pixels: int, length: int, tflop: float) -> None:
    assert step_flops(DEV, (pixels // 16) ** 2, length) / 1e12 == pytest.approx(tflop, abs=0.01)


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H200", "bfloat16", 989.4),
        ("NVIDIA H100 80GB HBM3", "float16", 989.4),
        ("NVIDIA H100 PCIe", "bfloat16", 756.0),
        ("NVIDIA H100 NVL", "bfloat16", 835.5),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312.0),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("NVIDIA GH200 480GB", "bfloat16", None),  # not in the table, and no H200
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
        ("NVIDIA H200 MIG 1g.18gb", "bfloat16", None),
        ("NVIDIA H200", "float32", None),
        (None, "bfloat16", None),
    ],
)
def test_a_peak_is_known_or_not_and_never_guessed(name: str | None, dtype: str, peak: float | None) -> None:
    assert peak_tflops(name, dtype) == peak


def test_utilisation_is_a_share_of_the_peak() -> None:
    assert utilisation(50e12, 0.1, 1000.0) == pytest.approx(0.5)
    assert utilisation(50e12, 0.1, None) is None
