"""What one process compiled, another one with an empty cache need not compile again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flux_batch.model.optimize.compile_cache import CompileCache
from flux_batch.model.optimize.quantize import quantize_transformer
from flux_batch.model.transformer import Flux
from helpers.golden import FLUX, filled

# Loads what is there, compiles the blocks of a model, saves if nothing was there; prints its misses of two caches.
WORKER = """
import sys
from pathlib import Path
import torch
from torch._dynamo.utils import counters
from flux_batch.model.optimize.compile_cache import CompileCache
from flux_batch.model.sampling import position_ids
from flux_batch.model.transformer import Flux
from helpers.golden import FLUX, filled, tensor

model, path = filled(Flux(FLUX)), Path(sys.argv[1])
cache = CompileCache(model)
if path.exists():
    cache.load(path.read_bytes())
model.double_blocks[0].compile()
with torch.inference_mode():
    pe = model.position_table(position_ids(7, 8, 12))
    txt = model.txt_in(tensor("in.txt", (1, 7, 24)))
    vec = model.conditioning(torch.ones(1), tensor("in.vec", (1, 32)), torch.ones(1))
    model.first_block(model.img_in(tensor("in.img", (1, 24, 64))), txt, model.modulations(vec), pe)
if not path.exists():
    path.write_bytes(cache.save())
print(counters["aot_autograd"]["autograd_cache_miss"], counters["inductor"]["fxgraph_cache_miss"], sep=",")
print(cache.name)
"""


def work(folder: Path, name: str) -> tuple[str, str]:
    """Run a worker whose own cache is empty. Returns: its misses, and the name of its cache."""
    tests = str(Path(__file__).parents[3])
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / name), "PYTHONPATH": tests}
    command = [sys.executable, "-W", "ignore", "-c", WORKER, str(folder / "artifacts")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    misses, cache = result.stdout.splitlines()[-2:]
    return misses, cache


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_process_with_an_empty_cache_finds_what_another_one_compiled(tmp_path: Path) -> None:
    first, name = work(tmp_path, "first")
    assert "0" not in first.split(",")
    assert work(tmp_path, "second") == ("0,0", name)


def test_the_name_tells_blocks_apart() -> None:
    models = [filled(Flux(FLUX)), filled(Flux(FLUX)), filled(Flux(FLUX)).bfloat16(), filled(Flux(FLUX)).bfloat16()]
    quantize_transformer(models[3])
    names = [CompileCache(model).name for model in models]
    assert names[0] == names[1]
    assert len(set(names)) == 3
    assert all(name.startswith("torch-") and "/" not in name and " " not in name for name in names)


@pytest.mark.parametrize("data", [b"", b"something else"])
def test_what_torch_has_not_saved_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"not what torch\.compile has saved"):
        CompileCache(filled(Flux(FLUX))).load(data)
