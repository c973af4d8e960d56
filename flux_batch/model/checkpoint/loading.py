"""A recognised checkpoint to a module with its weights: built on meta, checked, filled tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import nn

from flux_batch.model.autoencoder import AutoEncoder
from flux_batch.model.checkpoint.checkpoint import Checkpoint
from flux_batch.model.checkpoint.detect import CheckpointKind
from flux_batch.model.checkpoint.diffusers_keys import (
    Rules,
    State,
    autoencoder_rules,
    autoencoder_to_diffusers,
    original_names,
    transformer_rules,
    transformer_to_diffusers,
)
from flux_batch.model.checkpoint.lazy_state import Parts, StoredState
from flux_batch.model.params import Config, autoencoder_params, flux_params
from flux_batch.model.transformer import Flux

Module = TypeVar("Module", bound=nn.Module)
# Changes a module on meta before it is filled, in place: swaps layers for others that read themselves.
Prepare = Callable[[nn.Module], object]


@runtime_checkable
class ReadsItself(Protocol):
    """A layer that takes its weights from the stored state in a way of its own, such as fp8 kept as it is."""

    def read_stored(self, state: StoredState, name: str) -> None:
        """Take the weights of the layer called `name` in its model."""


def load_transformer(
    checkpoint: Checkpoint,
    kind: CheckpointKind,
    config: Config,
    *,
    dtype: torch.dtype,
    device: torch.device,
    prepare: Prepare | None = None,
) -> Flux:
    """Build the transformer a recognised checkpoint holds; `config`: diffusers' config.json of it, or empty.

    Raises: ValueError naming the file and the keys that are missing, too many or of another shape, or naming the
    variant (Fill, Canny, Depth) if it is one this program cannot run.
    """
    what = "a FLUX.1 transformer"
    rules = transformer_rules if kind is CheckpointKind.TRANSFORMER_DIFFUSERS else None
    with naming(checkpoint, what):
        shapes = original_names(checkpoint.shapes, rules) if rules else checkpoint.shapes
        params = flux_params(shapes, config)
        check_text_to_image(params.in_channels, params.out_channels)
        with torch.device("meta"):
            model = Flux(params)
    expected = transformer_to_diffusers(model.state_dict()) if rules else model.state_dict()
    return fill(model, checked_state(checkpoint, what, expected, rules, dtype, device), prepare)


def load_autoencoder(
    checkpoint: Checkpoint, kind: CheckpointKind, config: Config, *, dtype: torch.dtype, device: torch.device
) -> AutoEncoder:
    """Build the autoencoder a recognised checkpoint holds; `config`: diffusers' config.json of it, or empty.

    In float32 where float16 is asked for, in which it overflows: FLUX.1's own vae/config.json says force_upcast.
    Raises: ValueError naming the file and the keys that are missing, too many or of another shape.
    """
    what = "a FLUX.1 autoencoder"
    rules = autoencoder_rules if kind is CheckpointKind.AUTOENCODER_DIFFUSERS else None
    with naming(checkpoint, what):
        shapes = original_names(checkpoint.shapes, rules) if rules else checkpoint.shapes
        params = autoencoder_params(shapes, config)
        with torch.device("meta"):
            model = AutoEncoder(params)
    dtype = torch.float32 if dtype == torch.float16 else dtype
    expected = autoencoder_to_diffusers(model.state_dict()) if rules else model.state_dict()
    return for_device(fill(model, checked_state(checkpoint, what, expected, rules, dtype, device)), device)


def for_device(model: AutoEncoder, device: torch.device) -> AutoEncoder:
    """Lay an autoencoder out as the device's convolutions read it: channels last on CUDA, whose tensor cores take them.

    On the CPU it stays as it is: there images are those of diffusers bit for bit.
    """
    if device.type != "cuda":
        return model
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in its stubs


def checked_state(
    checkpoint: Checkpoint, what: str, expected: State, rules: Rules | None, dtype: torch.dtype, device: torch.device
) -> StoredState:
    """Return a checkpoint's tensors by our names, once it is sure to hold `expected`, by the names of its own layout.

    Checked in that layout, so that a message names what the file really holds.
    """
    checkpoint.check(what, {name: tensor.shape for name, tensor in expected.items()})
    parts = diffusers_parts(rules, expected) if rules else None
    return StoredState(checkpoint, dtype, device, parts=parts)


def diffusers_parts(rules: Rules, names: Mapping[str, object]) -> dict[str, Parts]:
    """Return what each of our tensors is made of, in a checkpoint of diffusers with these names."""
    return {rule.original: Parts(rule.diffusers, rule.join) for rule in rules(names) if rule.diffusers[0] in names}


def fill(model: Module, state: StoredState, prepare: Prepare | None = None) -> Module:
    """Give a module built on meta its weights, one after another, and return it ready for inference."""
    if prepare is not None:
        prepare(model)
    for prefix, module in model.named_modules():
        if isinstance(module, ReadsItself):
            module.read_stored(state, prefix)
            continue
        for name, _ in list(module.named_parameters(recurse=False)):
            tensor = state[f"{prefix}.{name}" if prefix else name]
            module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    # Where what LoRAs change is read again; the files stay mapped.
    model.stored = state  # type: ignore[assignment]
    return model.requires_grad_(False).eval()


@contextmanager
def naming(checkpoint: Checkpoint, what: str) -> Iterator[None]:
    """Put the checkpoint's name before the message of a ValueError raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{checkpoint.source} does not hold {what}: {error}") from error


def check_text_to_image(in_channels: int, out_channels: int) -> None:
    """Raise ValueError for the variants that take more than noise as input."""
    if in_channels == out_channels:
        return
    variants = {6 * out_channels: "FLUX.1-Fill", 2 * out_channels: "FLUX.1-Canny or -Depth"}
    name = variants.get(in_channels, "a variant that is not known")
    raise ValueError(
        f"img_in takes {in_channels} channels where text-to-image takes {out_channels}: this is {name}, "
        "which is not supported"
    )
