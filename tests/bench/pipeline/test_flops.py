import pytest

from flux_batch.bench.pipeline.flops import peak_tflops, utilisation


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
def test_a_peak_is_known_or_none(name: str | None, dtype: str, peak: float | None) -> None:
    assert peak_tflops(name, dtype) == peak


def test_utilisation_is_a_share_of_the_peak() -> None:
    assert utilisation(50e12, 0.1, 1000.0) == pytest.approx(0.5)
    assert utilisation(50e12, 0.1, None) is None
