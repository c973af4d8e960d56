"""Narrow weights: layers that keep weights in fp8 or bfloat16, and the choice of a model's layers.

The model is built plain; its layers are replaced here, either on meta before loading or with their weights. Numbers in
fp8 are e4m3 (4 bits of exponent, 3 of mantissa, up to 448) with a scale for each row, so that each row uses the whole
range.
Letters: o outputs, i inputs, r rows (tokens).
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_batch.model.checkpoint.lazy_state import CHUNK_NUMBERS, StoredState
from flux_batch.model.footprint import is_quantizable
from flux_batch.model.optimize.device_failure import raise_device_failure

E4M3 = torch.float8_e4m3fn
_E4M3_MAX = 448.0
# The lowest compute capability with products in fp8, and the number that sizes must be multiples of.
# https://docs.nvidia.com/cuda/cublas/#bit-floating-point-data-types-fp8-usage
_FP8_CAPABILITY = (8, 9)
_FP8_MULTIPLE = 16
# The layer of a `Modulation`, which multiplies one row for each image, while other layers multiply thousands.
_MODULATION = ".lin"


class Fp8Linear(nn.Module):
    """A linear layer with its weight in fp8, multiplied in the dtype of its input; for inference.

    Buffers: weight (o, i) float8_e4m3fn, or float8_e5m2 if the checkpoint holds that; weight_scale (o, 1) fp32;
    bias (o,) or None. `dense(dtype)` is rounded once, like a weight that is read from the checkpoint into that dtype.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        """Take over the weights of a linear layer, which may lie on meta."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = to_fp8_in_pieces(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def load_from(self, state: StoredState, name: str) -> None:
        """Read the weights of the layer `name` of a checkpoint; fp8 weights stay as they are, bit for bit."""
        stored = state.fp8(f"{name}.weight")
        if stored is not None and self.keeps(stored[0].dtype):
            self.weight = stored[0]
            self.weight_scale = stored[1].expand(len(self.weight), 1).contiguous()
        else:
            self.weight, self.weight_scale = to_fp8_in_pieces(state[f"{name}.weight"])
        if self.bias is not None:
            self.bias = state[f"{name}.bias"]

    def keeps(self, dtype: torch.dtype) -> bool:
        """Return whether fp8 weights of this dtype can be used as they are."""
        return True

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (o, i): the fp32 product with its scale, rounded once."""
        return self.weight.float().mul_(self.weight_scale).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _NarrowLinear(nn.Module):
    """A linear layer with a bfloat16 weight, multiplied in its input's float32; for inference.

    Buffers: weight (o, i) bfloat16; bias (o,) float32 or None. On a CPU without instructions for bfloat16, widening the
    matrix takes a fraction of the time of the product.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        """Take over the weights of a linear layer, which may lie on meta."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", linear.weight.detach().to(torch.bfloat16))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def load_from(self, state: StoredState, name: str) -> None:
        """Read the weights of the layer `name` of a checkpoint; bfloat16 weights stay mapped from the file."""
        self.weight = state.read(f"{name}.weight", torch.bfloat16)
        if self.bias is not None:
            self.bias = state[f"{name}.bias"]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Fp8MatmulLinear(Fp8Linear):
    """An Fp8Linear that multiplies in fp8: bfloat16 in and out, sums in fp32.

    Every row of the input gets its own scale, computed on the fly, so that a token does not depend on its neighbours.
    Without a GPU the same numbers are multiplied in fp32, which is slow and differs only in the order of the sums.
    """

    def keeps(self, dtype: torch.dtype) -> bool:
        return dtype == E4M3  # products with row scales accept no e5m2 on the right

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        result = fp8_matmul(*to_fp8(rows), self.weight, self.weight_scale, self.bias).to(x.dtype)
        return result.view(*x.shape[:-1], self.out_features)


def apply_fp8(model: nn.Module, *, matmul: bool = False) -> None:
    """Make a Flux keep the matrices of its blocks in fp8. matmul: multiply in fp8 as well.

    Modulation is always multiplied in the dtype of its input: it has one row for each image and affects every token.
    """
    for name, layer in _quantizable(model, "transformer"):
        fits = layer.in_features % _FP8_MULTIPLE == 0 and layer.out_features % _FP8_MULTIPLE == 0
        kind = Fp8MatmulLinear if matmul and fits and not name.endswith(_MODULATION) else Fp8Linear
        model.set_submodule(name, kind(layer))


def apply_narrow_weights(model: nn.Module) -> None:
    """Keep the matrices of a Flux's blocks in bfloat16, multiplied in their input's dtype."""
    for name, layer in _quantizable(model, "transformer"):
        model.set_submodule(name, _NarrowLinear(layer))


def apply_fp8_to_t5(model: nn.Module) -> None:
    """Make a T5 encoder keep the matrices of its blocks in fp8.

    They are always multiplied in the dtype of their input: T5 is under 1 % of the work, and its activations have the
    outliers for which it overflows in float16.
    """
    _replace_in_t5(model, Fp8Linear)


def apply_narrow_weights_to_t5(model: nn.Module) -> None:
    """Keep the matrices of a T5 encoder's blocks in bfloat16, multiplied in their input's dtype."""
    _replace_in_t5(model, _NarrowLinear)


def _replace_in_t5(model: nn.Module, kind: Callable[[nn.Linear], nn.Module]) -> None:
    """Replace the matrices of a T5 encoder's blocks by layers of another kind."""
    for name, layer in _quantizable(model, "t5"):
        model.set_submodule(name, kind(layer))


def _quantizable(model: nn.Module, part: str) -> list[tuple[str, nn.Linear]]:
    """Return the names and linear layers of a part whose weights may be narrow."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_quantizable(part, f"{name}.weight", module.weight.ndim)
    ]


def to_fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows (r, i) in e4m3 and their scales (r, 1) fp32: the largest number of a row becomes 448."""
    if rows.is_meta:  # computing on meta would cost a second, which torch needs once for its shape functions
        weight = torch.empty(rows.shape, dtype=E4M3, device=rows.device)
        return weight, torch.empty((len(rows), 1), dtype=torch.float32, device=rows.device)
    largest = torch.linalg.vector_norm(rows, ord=inf, dim=1, keepdim=True, dtype=torch.float32)
    # The minimum avoids a scale of 0 for a row of zeros, and an inexact subnormal scale for a row of tiny numbers.
    scale = (largest / _E4M3_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    return (rows / scale).to(E4M3), scale


def to_fp8_in_pieces(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same as `to_fp8`, some rows at a time.

    The fp32 form of the weights then needs little memory.
    """
    step = max(1, CHUNK_NUMBERS // rows.shape[1])
    if rows.is_meta or len(rows) <= step:
        return to_fp8(rows)
    weight = torch.empty(rows.shape, dtype=E4M3, device=rows.device)
    scale = torch.empty((len(rows), 1), dtype=torch.float32, device=rows.device)
    for start in range(0, len(rows), step):
        some = slice(start, start + step)
        weight[some], scale[some] = to_fp8(rows[some])
    return weight, scale


def fp8_matmul(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    *,
    fast_accumulation: bool = False,
) -> Tensor:
    """Return a @ b.T + bias of scaled fp8 rows: a (r, i), b (o, i) -> (r, o) bfloat16, summed in fp32.

    bias: (o,) bfloat16; a GPU adds it before it rounds. fast_accumulation: the tensor cores of a GPU keep 22 bits of a
    sum (pytorch #147971), which may be faster: `flux-batch bench kernels` measures both.
    """
    if a.is_cuda:
        return torch._scaled_mm(
            a,
            b.T,
            scale_a=a_scale,
            scale_b=b_scale.T,
            bias=bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=fast_accumulation,
        )
    product = (a.float() @ b.float().T * a_scale * b_scale.T).bfloat16()
    return product if bias is None else product + bias


def fp8_matmul_obstacle(device: torch.device) -> str:
    """Return the reason why a device cannot multiply in fp8, "" if it can. The CPU passes: it emulates the products.

    A GPU without such products is refused, since emulated products would be slower than those that they replace.
    """
    if device.type == "cpu":
        return ""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"{device} cannot multiply in fp8"
    capability = torch.cuda.get_device_capability(device)
    if capability < _FP8_CAPABILITY:
        name, has, needs = torch.cuda.get_device_name(device), _dotted(capability), _dotted(_FP8_CAPABILITY)
        return f"{name} cannot multiply in fp8 (compute capability {has}; {needs} is needed: Ada, Hopper or later)"
    error = fp8_product_error(device)
    return f"{torch.cuda.get_device_name(device)} cannot multiply in fp8 with this torch: {error}" if error else ""


def fp8_product_error(device: torch.device) -> str:
    """Return the reason why a small fp8 product fails on a GPU, else "".

    Some GPUs and libraries should support such products by their version, but refuse scales by row:
    CUBLAS_STATUS_NOT_SUPPORTED on an RTX PRO 5000 (pytorch #192707). Raises: the error of a device that has failed.
    """
    ones = torch.ones((_FP8_MULTIPLE, _FP8_MULTIPLE), device=device)
    rows, scale = ones.to(E4M3), ones[:, :1].contiguous()
    try:
        result = fp8_matmul(rows, scale, rows, scale, ones[0].bfloat16())
        return "" if (result == _FP8_MULTIPLE + 1).all() else "its numbers are wrong"
    except (RuntimeError, ValueError) as error:
        raise_device_failure(error, device)
        return str(error).partition("\n")[0]


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
