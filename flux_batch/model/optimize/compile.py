"""`torch.compile` of the repeated blocks.

A cold start compiles one block of each kind and the last block, not the whole model. The first size is compiled with
static shapes, the second with dynamic shapes, which then serve all other sizes. A batch of one and larger batches are
compiled separately. Compiled code stays in torch's cache (TORCHINDUCTOR_CACHE_DIR), which the processes of a machine
share; `CompileCache` takes it to other machines.

The autoencoder's decoder is compiled on a GPU only, also block by block. On two busy CPU cores a decoder a quarter as
wide as FLUX.1's took 28 to 41 s to compile and was then 4 to 13 % slower, since convolutions are most of its work. On a
GPU neither was measured with this code; published for the decoder: 27 ms instead of 117 ms (unsloth, pull request
10889), of about 3.5 s for an image.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import re
import sys
import warnings
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_batch.model import layers, rope
from flux_batch.model.autoencoder import AutoEncoder
from flux_batch.model.layers import BlockLinear, JointAttention, Matmul
from flux_batch.model.optimize import kernels, quantize
from flux_batch.model.optimize.attention import TORCH_ATTENTION, AttentionKernels
from flux_batch.model.optimize.device_failure import raise_device_failure
from flux_batch.model.rope import rotate_in_parts
from flux_batch.model.transformer import Flux

# torch's default limit is 8 graphs for each function; beyond it, torch runs the function uncompiled.
_MAX_GRAPHS = 64


def apply_compile(model: Flux, attention: AttentionKernels = TORCH_ATTENTION, *, dynamic: bool | None = None) -> None:
    """Make the blocks of a transformer compile on their first run. Call it after `apply_cpu_kernels`.

    attention: the kernels that the caller selects around the blocks; dynamic: as in torch.compile. Raises: ValueError
    if this machine lacks something that torch.compile needs.
    """
    device = model.img_in.weight.device
    set_compile_options(attention)
    _check_compiler(model)
    # The compiler leaves complex numbers uncompiled and warns. On a CPU that is wanted: compiled code for the rotation
    # takes eight times as long.
    warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex", UserWarning)
    for blocks in model.blocks:
        for block in blocks:
            use_compilable_functions(block, device)
            block.compile(dynamic=dynamic)


def set_compile_options(attention: AttentionKernels) -> None:
    """Set the options of torch.compile for this thread: torch keeps them per thread."""
    # torch's cache keys lack the vector width of the CPU, and AVX2 code run under AVX-512 writes out of bounds.
    capability = torch.backends.cpu.get_cpu_capability()
    torch.compiler.config.cache_key_tag = f"{_kernels_tag(attention)}-{capability}"
    # A function gets several graphs: for the last block, for batches of one and of several, and for sizes.
    torch._dynamo.config.recompile_limit = max(_MAX_GRAPHS, torch._dynamo.config.recompile_limit)


def is_compiled(model: Flux) -> bool:
    """Return whether `apply_compile` has changed a transformer."""
    return any(block._compiled_call_impl is not None for blocks in model.blocks for block in blocks)


def apply_compile_to_decoder(model: AutoEncoder) -> None:
    """Make the blocks of an autoencoder's decoder compile on their first run. Call it after `apply_compile`."""
    for level in (model.decoder.mid, *model.decoder.up):
        for block in level.children() if level is model.decoder.mid else level.block:
            block.compile()


def cuda_versions() -> tuple[str | None, int | None]:
    """Return the versions of CUDA and cuDNN that torch uses; None for each without CUDA."""
    return torch.version.cuda, torch.backends.cudnn.version() if torch.version.cuda else None


def device_kind(device: torch.device) -> str:
    """Return the kind of a device, as far as compiled code depends on it."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


class CompileCache:
    """The code that torch.compile has made for a transformer, as bytes for another process.

    Processes can share it if `name` is equal, which means equal torch, CUDA, cuDNN, attention kernels, Python, kind of
    device, blocks and source of the blocks. torch finds each graph by its own key, so bytes of another model are
    useless but harmless. Those keys lack the attention kernels that a graph calls, so their tag is added both to `name`
    and to torch's keys.
    Loading bytes can run any code in them, since torch's cache consists of pickles and programs: load them only from a
    place where nobody can write whose code may not run here.
    """

    def __init__(self, model: Flux, attention: AttentionKernels = TORCH_ATTENTION) -> None:
        device = re.sub(r"[^A-Za-z0-9]+", "-", device_kind(model.img_in.weight.device))
        python = sys.implementation.cache_tag
        kernels = _kernels_tag(attention)
        self.name = f"torch-{torch.__version__}-{python}-{device}-{kernels}-{_digest_of(model)}".replace("+", "-")

    def save(self) -> bytes | None:
        """Return all code that this process has compiled or found in its cache; None if there is none."""
        saved = torch.compiler.save_cache_artifacts()
        return None if saved is None else saved[0]

    def load(self, data: bytes) -> None:
        """Put another process's compiled code into this machine's cache. Raises: ValueError if it is damaged."""
        try:
            found = torch.compiler.load_cache_artifacts(data)
        except Exception as error:  # of any class: reading pickles raises anything
            raise ValueError(f"not a cache written by torch.compile: {error!r}") from error
        if found is None:
            raise ValueError("not a cache written by torch.compile")


class _SigmoidGELU(nn.Module):
    """The tanh approximation of GELU, computed with a sigmoid: (1 + tanh(u / 2)) / 2 = sigmoid(u).

    A compiled sigmoid takes less than half the time of a compiled tanh.
    """

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))).to(x.dtype)


def _matmul_then_bias(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer and add the bias in a separate operation, which is fused.

    F.linear with a bias makes a CPU first write the bias out in the full size of the result.
    """
    return F.linear(x, weight) if bias is None else F.linear(x, weight) + bias


# Functions for which the compiler makes slow code on a CPU, or none -> their replacements.
_COMPILABLE: Mapping[Matmul, Matmul] = {
    F.linear: _matmul_then_bias,
    kernels.onednn_matmul: kernels.opaque_onednn_matmul,
}


def _check_compiler(model: Flux) -> None:
    device = model.img_in.weight.device
    # Before Ada Triton reads no e4m3, which torch goes round from 2.13 on (its issue 167082).
    dtype = quantize.E4M3 if any(isinstance(layer, quantize.Fp8Linear) for layer in model.modules()) else torch.float32
    try:
        probe: Callable[[Tensor], Tensor] = torch.compile(lambda x: x.float() + 1)
        probe(torch.zeros(2, device=device).to(dtype))
    except Exception as error:  # of many classes: no C++ compiler, no Triton, no headers, no folder to write to
        raise_device_failure(error, device)
        raise ValueError(f"torch.compile does not work here: {error}") from error


def use_compilable_functions(block: nn.Module, device: torch.device) -> None:
    """Replace the functions of a block for which the compiler makes slow code."""
    for name, module in list(block.named_modules()):
        if isinstance(module, nn.GELU):
            block.set_submodule(name, _SigmoidGELU())
        elif isinstance(module, JointAttention) and device.type != "cpu":
            module.rotate = rotate_in_parts
        elif isinstance(module, BlockLinear) and device.type == "cpu":
            module.matmul = _COMPILABLE.get(module.matmul, module.matmul)


def _kernels_tag(attention: AttentionKernels) -> str:
    """Return a name for the libraries and attention kernels that compiled code calls."""
    cuda, cudnn = cuda_versions()
    libraries = f"-cuda-{cuda}-cudnn-{cudnn}" if cudnn else ""
    return f"attention-{attention.name}{libraries}"


def _digest_of(model: Flux) -> str:
    """Return a short hash of a model's blocks: their layers, sizes, dtype and source code."""
    blocks = [str(kind[:1]) for kind in model.blocks]
    sources = [inspect.getsource(module) for module in (layers, rope, kernels, quantize, sys.modules[__name__])]
    text = "\0".join([str(model.img_in.weight.dtype), *blocks, *sources])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
