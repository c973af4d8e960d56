"""Compiled blocks: the velocities of plain ones, one graph for all of a kind, a clear error, and a cache for others."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend

from flux_batch.model.optimize.attention import AttentionKernels
from flux_batch.model.optimize.compile import CompileCache, apply_compile
from flux_batch.model.optimize.kernels import apply_cpu_kernels
from flux_batch.model.optimize.quantize import E4M3, apply_fp8
from flux_batch.model.params import FluxParams
from flux_batch.model.rope import rotary_table, rotate, rotate_in_parts
from flux_batch.model.sampling import position_ids
from flux_batch.model.transformer import Flux
from helpers.golden import FLUX, filled, tensor

# Loads what is there, compiles the blocks of a model, saves if nothing was there; prints its misses of two caches.
WORKER = """
import sys
from pathlib import Path
import torch
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend
from flux_batch.model.optimize.attention import AttentionKernels
from flux_batch.model.optimize.compile import CompileCache
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

# A block of each kind. Of them one is compiled, each somewhere: code for all is made for minutes.
SMALL = replace(FLUX, depth=1, depth_single_blocks=1)

# torch's own, when its compiler is imported.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch.compiler.config.patch(cache_key_tag=""):
        yield
    torch._dynamo.reset()


def velocity(model: Flux, images: int = 2, rows: int = 4, cols: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    inputs = tensor("in.img", (images, rows * cols, 64)), tensor("in.txt", (images, 7, 24))
    pe = model.position_table(position_ids(7, 2 * rows, 2 * cols))
    ones = torch.ones(images, dtype=dtype)
    with torch.inference_mode():
        return model(*(x.to(dtype) for x in inputs), pe, ones, tensor("in.vec", (images, 32)).to(dtype), 3.5 * ones)


def leave_plain(blocks: nn.ModuleList) -> None:
    """Undo what compile() of a module does."""
    for block in blocks:
        block._compiled_call_impl = None


def num_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.compiled
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_a_kind_of_block_and_the_last_one_are_compiled_once_for_a_size_and_once_more_for_all_others(
    amd: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """A graph is the same, whatever makes code of it."""
    plain, model = filled(Flux(FLUX)), filled(Flux(FLUX))
    names = list(model.state_dict())
    apply_cpu_kernels(model)
    monkeypatch.undo()  # what is compiled is kept for the CPU that is here
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    apply_compile(model)
    num_before = num_graphs()
    torch.testing.assert_close(velocity(model), velocity(plain), rtol=0, atol=2e-5)
    assert num_graphs() - num_before == 3
    for size in ((4, 8), (6, 4), (8, 6), (4, 6)):
        torch.testing.assert_close(velocity(model, 2, *size), velocity(plain, 2, *size), rtol=0, atol=2e-5)
    assert num_graphs() - num_before == 6
    assert not counters["graph_break"]
    assert list(model.state_dict()) == names


@pytest.mark.compiled
@pytest.mark.parametrize(("params", "dynamic"), [(SMALL, True), pytest.param(FLUX, None, marks=pytest.mark.long)])
def test_compiled_blocks_are_exact_at_every_size(
    amd: Path, monkeypatch: pytest.MonkeyPatch, params: FluxParams, dynamic: bool | None
) -> None:
    plain, model = filled(Flux(params)), filled(Flux(params))
    apply_cpu_kernels(model)  # as a pipeline does; here with products by oneDNN, which others do without
    monkeypatch.undo()  # what is compiled is kept for the CPU that is here
    apply_compile(model, dynamic=dynamic)
    if params is SMALL:
        leave_plain(model.double_blocks)
    for size in ((4, 6), (4, 8), (8, 6)):
        torch.testing.assert_close(velocity(model, 2, *size), velocity(plain, 2, *size), rtol=0, atol=2e-5)

    # Weights that change are seen, as those of a LoRA, which is merged in place.
    before = velocity(model)
    for one in (plain, model):
        one.single_blocks[0].linear2.weight.data.mul_(1.5)
    after = velocity(model)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, velocity(plain), rtol=0, atol=2e-5)


@pytest.mark.compiled
@pytest.mark.parametrize(
    "matmul", [False, pytest.param(True, marks=pytest.mark.long)], ids=["bfloat16", "products in fp8"]
)
def test_narrow_blocks_are_as_exact_compiled(matmul: bool) -> None:
    params = FLUX if matmul else SMALL
    plain, model = (filled(Flux(params)).bfloat16().requires_grad_(False) for _ in range(2))
    if matmul:
        for one in (plain, model):
            apply_fp8(one, matmul=True)
    apply_compile(model)
    if params is SMALL:
        leave_plain(model.double_blocks)
    exact = velocity(filled(Flux(params)))
    made = [velocity(one, dtype=torch.bfloat16).float() for one in (plain, model)]
    errors = [float((one - exact).norm() / exact.norm()) for one in made]
    assert errors[0] > (0.01 if matmul else 0.001)
    assert errors[1] == pytest.approx(errors[0], rel=0.15)
    assert not counters["graph_break"]


@pytest.mark.compiled
def test_modulation_is_not_compiled_and_keeps_its_bits() -> None:
    plain, model = (filled(Flux(FLUX)).bfloat16().requires_grad_(False) for _ in range(2))
    apply_compile(model)
    vec = tensor("in.vec", (5, FLUX.hidden_size)).bfloat16()
    for ours, theirs in zip(model.modulations(vec).tensors(), plain.modulations(vec).tensors(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_machine_that_cannot_compile_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_nothing(*given: Any, **others: Any) -> Any:
        def fail(*given: Any) -> Any:
            raise RuntimeError("no C++ compiler")

        return fail

    monkeypatch.setattr(torch, "compile", compile_nothing)
    with pytest.raises(ValueError, match=r"torch\.compile does not work here: no C\+\+ compiler"):
        apply_compile(filled(Flux(FLUX)))


def test_a_machine_that_cannot_compile_for_fp8_is_told_if_the_model_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def probe(x: Tensor) -> Tensor:
        if x.dtype == E4M3:
            raise ValueError("type fp8e4nv not supported in this architecture")
        return x

    monkeypatch.setattr(torch, "compile", lambda function, **how: probe)
    model = filled(Flux(FLUX))
    apply_compile(model)
    apply_fp8(model)
    with pytest.raises(ValueError, match=r"torch\.compile does not work here: type fp8e4nv not supported"):
        apply_compile(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotation_in_parts_is_the_same(dtype: torch.dtype) -> None:
    q = torch.randn(2, 24, 3, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    pe = rotary_table(position_ids(0, 8, 12), (4, 6, 6), 10_000)
    assert torch.equal(rotate_in_parts(q, pe), rotate(q, pe))
    assert rotate_in_parts(q, pe).dtype == dtype


def work(folder: Path, name: str) -> tuple[str, str]:
    """Run a worker whose own cache is empty. Returns: its misses, and the name of its cache."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / name)}
    command = [sys.executable, "-W", "ignore", "-c", WORKER, str(folder / "artifacts")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    misses, cache = result.stdout.splitlines()[-2:]
    return misses, cache


@pytest.mark.compiled
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_process_with_an_empty_cache_finds_what_another_one_compiled(tmp_path: Path) -> None:
    first, name = work(tmp_path, "first")
    assert "0" not in first.split(",")
    assert work(tmp_path, "second") == ("0,0", name)


def attend(kernels: AttentionKernels) -> str:
    """Compile as for a model with these kernels. Returns: how many programs torch's cache had, and how many not."""
    torch._dynamo.reset()
    counters.clear()
    apply_compile(filled(Flux(FLUX)), kernels)
    q = tensor("q", (1, 2, 8, 16))
    with kernels.first():
        torch.compile(lambda: F.scaled_dot_product_attention(q, q, q))()
    found = counters["aot_autograd"]
    return f"{found['autograd_cache_hit']} found, {found['autograd_cache_miss']} made"


@pytest.mark.compiled
def test_code_compiled_for_one_width_of_vectors_is_not_found_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own keys do not tell them apart: code for AVX2 that AVX-512 finds writes past the end of memory."""
    kernels = AttentionKernels(f"math-{uuid.uuid4().hex}", (SDPBackend.MATH,))

    def attend_with(capability: str) -> str:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        return attend(kernels)

    made = [attend_with(each) for each in ("AVX2", "AVX512", "AVX2")]
    assert made == ["0 found, 2 made", "0 found, 2 made", "2 found, 0 made"]


@pytest.mark.compiled
def test_code_compiled_for_one_attention_kernel_is_not_found_for_another() -> None:
    """torch's own keys do not tell them apart, and the kernel is written into the code."""
    # Under names that nothing was compiled for before.
    backends = SDPBackend.MATH, SDPBackend.FLASH_ATTENTION
    math, flash = (AttentionKernels(f"{each.name}-{uuid.uuid4().hex}", (each,)) for each in backends)
    # The small program by which apply_compile tries the compiler, and the attention.
    assert [attend(each) for each in (math, flash, math)] == ["0 found, 2 made", "0 found, 2 made", "2 found, 0 made"]
    assert CompileCache(filled(Flux(FLUX)), math).name != CompileCache(filled(Flux(FLUX)), flash).name


def test_the_name_tells_blocks_apart() -> None:
    models = [filled(Flux(FLUX)), filled(Flux(FLUX)), filled(Flux(FLUX)).bfloat16(), filled(Flux(FLUX)).bfloat16()]
    apply_fp8(models[3])
    names = [CompileCache(model).name for model in models]
    assert names[0] == names[1]
    assert len(set(names)) == 3
    assert all(name.startswith("torch-") and "/" not in name and " " not in name for name in names)


@pytest.mark.parametrize("data", [b"", b"something else"])
def test_what_torch_has_not_saved_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"not a cache written by torch\.compile"):
        CompileCache(filled(Flux(FLUX))).load(data)
