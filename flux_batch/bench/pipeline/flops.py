"""How much the transformer computes, and how much a device could: operations, peaks, utilisation.

A multiply-add counts 2. Letters: h hidden size, m width of the MLP, n image tokens, l text tokens, S = n + l.
"""

from __future__ import annotations

from flux_batch.model.layers import SINUSOID_WIDTH
from flux_batch.model.params import FluxParams

# Dense bfloat16 with fp32 sums, in TFLOP/s, without sparsity, at the clock of the data sheet: NVIDIA's data sheets of
# H100 (SXM, PCIe, NVL), H200 (SXM, NVL), A100, B200, L40S, L4 and its Ada whitepaper for the RTX 4090. Words of the
# name that torch gives; the first line whose words all occur counts.
PEAK_TFLOPS: tuple[tuple[frozenset[str], float], ...] = (
    (frozenset({"H100", "PCIe"}), 756.0),
    (frozenset({"H100", "NVL"}), 835.5),
    (frozenset({"H100"}), 989.4),
    (frozenset({"H200", "NVL"}), 835.5),
    (frozenset({"H200"}), 989.4),
    (frozenset({"B200"}), 2250.0),
    (frozenset({"A100"}), 312.0),
    (frozenset({"L40S"}), 362.0),
    (frozenset({"L4"}), 121.0),
    (frozenset({"RTX", "4090"}), 165.2),
)
HALF_PRECISION = ("bfloat16", "float16")


def step_flops(params: FluxParams, num_image_tokens: int, num_text_tokens: int) -> int:
    """Return the operations of one pass over one image: products of matrices and attention, nothing elementwise.

    Per block 8 h^2 S + 4 h m S + 4 S^2 h, which is 24 h^2 S + 4 S^2 h where m = 4 h. FLUX.1-dev at 1024 x 1024 with
    512 text tokens: 74.4e12. Every block counts whole; the text that the last one leaves out is a thousandth of it.
    """
    h, m, n, l = params.hidden_size, params.mlp_hidden_dim, num_image_tokens, num_text_tokens  # noqa: E741
    tokens = n + l
    block = 8 * h * h * tokens + 4 * h * m * tokens + 4 * tokens * tokens * h
    modulation = params.depth * 24 * h * h + params.depth_single_blocks * 6 * h * h + 4 * h * h
    embedded = [SINUSOID_WIDTH, params.vec_in_dim] + [SINUSOID_WIDTH] * params.guidance_embed
    conditioning = sum(2 * (width * h + h * h) for width in embedded)
    ends = 2 * h * (params.in_channels * n + params.context_in_dim * l + params.out_channels * n)
    return (params.depth + params.depth_single_blocks) * block + modulation + conditioning + ends


def peak_tflops(device_name: str | None, dtype: str) -> float | None:
    """Return the peak of a device for dense products in `dtype`, in TFLOP/s; None if it is not known.

    Part of a device (MIG) or one of a laptop has none that its name tells, and fp32 depends on whether TF32 is allowed.
    """
    if device_name is None or dtype not in HALF_PRECISION:
        return None
    words = set(device_name.replace("-", " ").split())
    if words & {"MIG", "Laptop"}:
        return None
    return next((peak for needed, peak in PEAK_TFLOPS if needed <= words), None)


def utilisation(flops: float, seconds: float, peak: float | None) -> float | None:
    """Return the share of the peak (TFLOP/s) that `flops` in `seconds` are; None without a peak."""
    return None if peak is None else flops / seconds / (peak * 1e12)
