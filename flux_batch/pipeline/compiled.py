"""The decision to compile a model, and the kernels in use; knows no prompt or image."""

from __future__ import annotations

import logging

import torch

from flux_batch.errors import InvalidSetting
from flux_batch.model.autoencoder import AutoEncoder
from flux_batch.model.optimize.attention import AttentionKernels
from flux_batch.model.optimize.compile import (
    CompileCache,
    apply_compile,
    apply_compile_to_decoder,
    cuda_versions,
    device_kind,
    is_compiled,
)
from flux_batch.model.transformer import Flux
from flux_batch.records import Kernels

log = logging.getLogger(__name__)


def compile_model(
    transformer: Flux, autoencoder: AutoEncoder, attention: AttentionKernels, compile: bool | None
) -> CompileCache | None:
    """Compile a model if that is wanted; None: on a GPU. Returns: the cache of what is compiled, if `compile` is True.

    Reading such a cache may run code that is in it: nobody shares it without asking. Raises: InvalidSetting if
    `compile` is True and torch.compile does not work here.
    """
    device = transformer.img_in.weight.device
    if not (device.type == "cuda" if compile is None else compile):
        return None
    try:
        apply_compile(transformer, attention)
    except ValueError as error:
        if compile:
            raise InvalidSetting(f"compile = True: {error}", field="compile") from error
        log.warning("blocks are not compiled, images take longer: %s", error)
        return None
    if device.type == "cuda":
        apply_compile_to_decoder(autoencoder)
    return CompileCache(transformer, attention) if compile else None


def kernels_of(transformer: Flux, attention: AttentionKernels) -> Kernels:
    """Return the kernels that compute a model's images."""
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
