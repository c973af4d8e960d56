"""The speed-ups of a model: kernels of its device, compiled blocks, CUDA graphs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch

from flux_batch.errors import InvalidSetting
from flux_batch.model.autoencoder import AutoEncoder
from flux_batch.model.optimize.attention import AttentionKernels, choose_attention
from flux_batch.model.optimize.compile import (
    CompileCache,
    apply_compile,
    apply_compile_to_decoder,
    cuda_versions,
    device_kind,
    is_compiled,
)
from flux_batch.model.optimize.cuda_graphs import CudaGraphs
from flux_batch.model.optimize.kernels import apply_cpu_kernels, apply_mps_kernels
from flux_batch.model.transformer import Flux
from flux_batch.records import Kernels

log = logging.getLogger(__name__)


class _SpeedUps(NamedTuple):
    """The speed-ups of a model that its pipeline must know; None for those that are off."""

    attention: AttentionKernels
    compile_cache: CompileCache | None
    graphs: CudaGraphs | None


def apply_speed_ups(
    transformer: Flux,
    autoencoder: AutoEncoder,
    compile: bool | None = None,
    cuda_graphs: bool = False,
    controlnets: Sequence[Flux] = (),
) -> _SpeedUps:
    """Make a model use the kernels of its device and the requested speed-ups.

    Raises: InvalidSetting if `compile` is True and torch.compile does not work here, or if `cuda_graphs` is True
    without a CUDA device.
    """
    device = transformer.img_in.weight.device
    for model in {id(each): each for each in (transformer, *controlnets)}.values():
        apply_cpu_kernels(model)
        apply_mps_kernels(model, device)
    attention = choose_attention(device)
    cache = _compile_model(transformer, autoencoder, attention, compile, controlnets)
    try:
        graphs = CudaGraphs(transformer) if cuda_graphs else None
    except ValueError as error:
        raise InvalidSetting(f"cuda_graphs = True: {error}", field="cuda_graphs") from error
    return _SpeedUps(attention, cache, graphs)


def _compile_model(
    transformer: Flux,
    autoencoder: AutoEncoder,
    attention: AttentionKernels,
    compile: bool | None,
    controlnets: Sequence[Flux] = (),
) -> CompileCache | None:
    """Compile a model if `compile` is True, or None on a GPU. Returns: the cache of compiled code if it is True.

    Reading such a cache can run code in it, so only an explicit True shares it. Raises: InvalidSetting if `compile` is
    True and torch.compile does not work here.
    """
    device = transformer.img_in.weight.device
    if not (device.type == "cuda" if compile is None else compile):
        return None
    try:
        for model in {id(each): each for each in (transformer, *controlnets)}.values():
            apply_compile(model, attention)
    except ValueError as error:
        if compile:
            raise InvalidSetting(f"compile = True: {error}", field="compile") from error
        log.warning("blocks are not compiled, images take longer: %s", error)
        return None
    if device.type == "cuda":
        apply_compile_to_decoder(autoencoder)
    return CompileCache(transformer, attention) if compile else None


def kernels_of(transformer: Flux, attention: AttentionKernels) -> Kernels:
    """Return the device, attention and libraries that compute a model's images."""
    device = transformer.img_in.weight.device
    cuda, cudnn = cuda_versions() if device.type == "cuda" else (None, None)
    return Kernels(
        device=device_kind(device),
        attention=attention.name,
        compile=is_compiled(transformer),
        torch=str(torch.__version__),
        cuda=cuda,
        cudnn=cudnn,
    )
