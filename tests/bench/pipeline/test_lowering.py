import pytest
import torch

from flux_batch.bench.pipeline.lowering import bench_lowering


@pytest.mark.filterwarnings("ignore")  # of torch about its own code
@pytest.mark.compiled
def test_each_block_is_as_many_kernels_as_the_page_says() -> None:
    pytest.importorskip("triton")
    if torch.version.cuda is not None or torch.version.hip is not None:
        pytest.skip("torch is built for a GPU")

    counts = {name: len(found["triton"]) for name, found in bench_lowering()["blocks"].items()}
    assert counts == {
        "double block, bfloat16": 14,
        "double block, fp8": 16,
        "single block, bfloat16": 4,
        "single block, fp8": 4,
    }
