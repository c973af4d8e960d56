"""The peak operations per second of devices, and the share in use."""

from __future__ import annotations

# Dense bfloat16 with fp32 sums, in TFLOP/s, without sparsity, at the clock of the data sheet. Sources: NVIDIA's data
# sheets of H100 (SXM, PCIe, NVL), H200 (SXM, NVL), A100, B200, L40S, L4, and the Ada whitepaper for the RTX 4090. The
# keys are words of the name that torch returns; the first line whose words all occur counts.
_PEAK_TFLOPS: tuple[tuple[frozenset[str], float], ...] = (
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
_HALF_PRECISION = ("bfloat16", "float16")


def peak_tflops(device_name: str | None, dtype: str) -> float | None:
    """Return the peak of a device for dense products in `dtype`, in TFLOP/s; None if it is not known.

    It is unknown for a part of a device (MIG) or a laptop's, whose names do not show it, and for fp32, which depends on
    whether TF32 is allowed.
    """
    if device_name is None or dtype not in _HALF_PRECISION:
        return None
    words = set(device_name.replace("-", " ").split())
    if words & {"MIG", "Laptop"}:
        return None
    return next((peak for needed, peak in _PEAK_TFLOPS if needed <= words), None)


def utilisation(flops: float, seconds: float, peak: float | None) -> float | None:
    """Return `flops` in `seconds` as a share of the peak (TFLOP/s); None without a peak."""
    return None if peak is None else flops / seconds / (peak * 1e12)
