"""`torch.compile` of the repeated blocks: a cold start costs one block of each kind and the last, not the whole model.

The model is built plain and changed from here. The first size is compiled by itself, the second as any size, which
then serves all others; a batch of one and larger batches are compiled apart. Compiled code stays in torch's own cache
(TORCHINDUCTOR_CACHE_DIR), which the processes of a machine share; `CompileCache` takes it to other machines.

The autoencoder's decoder is compiled on a GPU alone, block by block as well. On two busy CPU cores a decoder a quarter
as wide as FLUX.1's took 28 to 41 s to compile and was 4 to 13 % slower than without, its convolutions being most of the
work. On a GPU neither was measured with this code; published are 27 ms instead of 117
(unsloth, pull request 10889), of some 3.5 s an image.
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

# torch's own limit is 8 of a function, after which it runs the function as it is.
_MAX_GRAPHS = 64


def apply_compile(model: Flux, attention: AttentionKernels = TORCH_ATTENTION, *, dynamic: bool | None = None) -> None:
    """Make the blocks of a transformer compile when they are first run; after `apply_cpu_kernels`.

    attention: the kernels that are asked for around the blocks; dynamic: as of torch.compile. Raises: ValueError if
    this machine lacks something that torch.compile needs.
    """
    device = model.img_in.weight.device
    set_compile_options(attention)
    _check_compiler(model)
    # What is compiled for complex numbers on a CPU takes eight times as long as a rotation that is left out.
    warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex", UserWarning)
    for blocks in model.blocks:
        for block in blocks:
            use_compilable_functions(block, device)
            block.compile(dynamic=dynamic)


def set_compile_options(attention: AttentionKernels) -> None:
    """Set the options of torch.compile for this thread: torch keeps them for each thread apart."""
    # torch's keys leave out how wide a CPU's vectors are: AVX2's code, found again for AVX-512, writes past its memory.
    capability = torch.backends.cpu.get_cpu_capability()
    torch.compiler.config.cache_key_tag = f"{_kernels_tag(attention)}-{capability}"
    # The last block, batches of one and of several, and sizes make several graphs of one function.
    torch._dynamo.config.recompile_limit = max(_MAX_GRAPHS, torch._dynamo.config.recompile_limit)


def is_compiled(model: Flux) -> bool:
    """Return whether `apply_compile` has changed a transformer."""
    return any(block._compiled_call_impl is not None for blocks in model.blocks for block in blocks)


def apply_compile_to_decoder(model: AutoEncoder) -> None:
    """Make the blocks of an autoencoder's decoder compile when they are first run; after `apply_compile`."""
    for level in (model.decoder.mid, *model.decoder.up):
        for block in level.children() if level is model.decoder.mid else level.block:
            block.compile()


def cuda_versions() -> tuple[str | None, int | None]:
    """Return the versions of CUDA and cuDNN that torch uses; None without."""
    return torch.version.cuda, torch.backends.cudnn.version() if torch.version.cuda else None


def device_kind(device: torch.device) -> str:
    """Return the name of a device as far as compiled code depends on it."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


class CompileCache:
    """The code that torch.compile has made for a transformer, as bytes for another process; knows no file and no run.

    `name` is the same for the same torch, CUDA, cuDNN, attention kernels, Python, kind of device, blocks and source of
    these: those can share it. torch looks each graph up by its own key, so that bytes of another model would be of no
    use, and do no harm. It does not know the attention kernels, which are written into a graph: their tag is part of
    its keys, here and in torch's own folder.
    Loading bytes may run any code that is in them, as torch's cache is made of pickles and programs: they must come
    from where only those can write whose code may run here.
    """

    def __init__(self, model: Flux, attention: AttentionKernels = TORCH_ATTENTION) -> None:
        device = re.sub(r"[^A-Za-z0-9]+", "-", device_kind(model.img_in.weight.device))
        python = sys.implementation.cache_tag
        kernels = _kernels_tag(attention)
        self.name = f"torch-{torch.__version__}-{python}-{device}-{kernels}-{_digest_of(model)}".replace("+", "-")

    def save(self) -> bytes | None:
        """Return everything that this process has compiled or found in its cache so far; None if that is nothing."""
        saved = torch.compiler.save_cache_artifacts()
        return None if saved is None else saved[0]

    def load(self, data: bytes) -> None:
        """Put what another process has compiled into the cache of this machine. Raises: ValueError if it is damaged."""
        try:
            found = torch.compiler.load_cache_artifacts(data)
        except Exception as error:  # of any class: pickles are read
            raise ValueError(f"not a cache written by torch.compile: {error!r}") from error
        if found is None:
            raise ValueError("not a cache written by torch.compile")


class _SigmoidGELU(nn.Module):
    """GELU in its approximation with tanh: (1 + tanh(u / 2)) / 2 is the sigmoid of u.

    Compiled, a sigmoid takes less than half the time of a tanh.
    """

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))).to(x.dtype)


def _matmul_then_bias(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer, with the bias left to the kernel that reads the product.

    With a bias, a CPU first writes that out in full size.
    """
    return F.linear(x, weight) if bias is None else F.linear(x, weight) + bias


# In place of functions for which the compiler makes slow code on a CPU, or none.
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
    except Exception as error:  # of many classes, by what is missing: a C++ compiler, Triton, headers, a folder
        raise_device_failure(error, device)
        raise ValueError(f"torch.compile does not work here: {error}") from error


def use_compilable_functions(block: nn.Module, device: torch.device) -> None:
    """Replace a block's functions for which the compiler makes slow code on this device."""
    for name, module in list(block.named_modules()):
        if isinstance(module, nn.GELU):
            block.set_submodule(name, _SigmoidGELU())
        elif isinstance(module, JointAttention) and device.type != "cpu":
            module.rotate = rotate_in_parts
        elif isinstance(module, BlockLinear) and device.type == "cpu":
            module.matmul = _COMPILABLE.get(module.matmul, module.matmul)


def _kernels_tag(attention: AttentionKernels) -> str:
    """Return the name of the libraries and the attention that compiled code calls."""
    cuda, cudnn = cuda_versions()
    libraries = f"-cuda-{cuda}-cudnn-{cudnn}" if cudnn else ""
    return f"attention-{attention.name}{libraries}"


def _digest_of(model: Flux) -> str:
    """Return a short hash of a model's blocks: their layers, sizes and dtype, and the source of all these."""
    blocks = [str(kind[:1]) for kind in model.blocks]
    sources = [inspect.getsource(module) for module in (layers, rope, kernels, quantize, sys.modules[__name__])]
    text = "\0".join([str(model.img_in.weight.dtype), *blocks, *sources])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
