"""Loading of a checkpoint into a module: built on meta, checked, filled tensor by tensor."""

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
    controlnet_rules,
    controlnet_to_diffusers,
    original_names,
    transformer_rules,
    transformer_to_diffusers,
)
from flux_batch.model.checkpoint.lazy_state import Pieces, StoredState
from flux_batch.model.conditions.controlnet import ControlNet, controlnet_params
from flux_batch.model.conditions.variant import variant_of
from flux_batch.model.params import Config, autoencoder_params, flux_params
from flux_batch.model.transformer import Flux

_Module = TypeVar("_Module", bound=nn.Module)
# Changes a module on meta in place before its weights are loaded: replaces layers by layers that load themselves.
Prepare = Callable[[nn.Module], object]


@runtime_checkable
class SelfLoading(Protocol):
    """A layer that loads its weights in its own way, such as one in fp8."""

    def load_from(self, state: StoredState, name: str) -> None:
        """Load the weights of the layer, which the model calls `name`."""


def load_transformer(
    checkpoint: Checkpoint,
    kind: CheckpointKind,
    config: Config,
    *,
    dtype: torch.dtype,
    device: torch.device,
    prepare: Prepare | None = None,
) -> Flux:
    """Load the transformer of a checkpoint; `config`: its config.json of diffusers, or empty.

    Raises: ValueError with the file and the keys that are missing, unknown or of another shape, or with the variant
    that is not supported.
    """
    what = "a FLUX.1 transformer"
    rules = transformer_rules if kind is CheckpointKind.TRANSFORMER_DIFFUSERS else None
    with naming_errors(checkpoint, what):
        shapes = original_names(checkpoint.shapes, rules) if rules else checkpoint.shapes
        params = flux_params(shapes, config)
        variant_of(params)
        with torch.device("meta"):
            model = Flux(params)
    expected = transformer_to_diffusers(model.state_dict()) if rules else model.state_dict()
    return load_weights(model, _checked_state(checkpoint, what, expected, rules, dtype, device), prepare)


def load_controlnet(
    checkpoint: Checkpoint,
    config: Config,
    *,
    dtype: torch.dtype,
    device: torch.device,
    prepare: Prepare | None = None,
) -> ControlNet:
    """Load a ControlNet; its keys tell the layout. `config`: its config.json of diffusers, or empty.

    Raises: ValueError with the file and the keys that are missing, unknown or of another shape.
    """
    what = "a ControlNet of FLUX.1"
    is_diffusers = any(name.startswith(CheckpointKind.TRANSFORMER_DIFFUSERS.value) for name in checkpoint.tensors)
    rules = controlnet_rules if is_diffusers else None
    with naming_errors(checkpoint, what):
        shapes = original_names(checkpoint.shapes, rules) if rules else checkpoint.shapes
        params = controlnet_params(shapes, config)
        with torch.device("meta"):
            model = ControlNet(params)
    expected = controlnet_to_diffusers(model.state_dict()) if rules else model.state_dict()
    return load_weights(model, _checked_state(checkpoint, what, expected, rules, dtype, device), prepare)


def load_autoencoder(
    checkpoint: Checkpoint, kind: CheckpointKind, config: Config, *, dtype: torch.dtype, device: torch.device
) -> AutoEncoder:
    """Load the autoencoder of a checkpoint; `config`: its config.json of diffusers, or empty.

    It overflows in float16, so float32 replaces float16: FLUX.1's own vae/config.json says force_upcast.
    Raises: ValueError with the file and the keys that are missing, unknown or of another shape.
    """
    what = "a FLUX.1 autoencoder"
    rules = autoencoder_rules if kind is CheckpointKind.AUTOENCODER_DIFFUSERS else None
    with naming_errors(checkpoint, what):
        shapes = original_names(checkpoint.shapes, rules) if rules else checkpoint.shapes
        params = autoencoder_params(shapes, config)
        with torch.device("meta"):
            model = AutoEncoder(params)
    dtype = torch.float32 if dtype == torch.float16 else dtype
    expected = autoencoder_to_diffusers(model.state_dict()) if rules else model.state_dict()
    return for_device(load_weights(model, _checked_state(checkpoint, what, expected, rules, dtype, device)), device)


@torch.inference_mode(False)  # as in load_weights
def for_device(model: AutoEncoder, device: torch.device) -> AutoEncoder:
    """Return an autoencoder in the memory format of the device: channels last on CUDA, for its tensor cores.

    On the CPU it stays unchanged, so that images equal those of diffusers bit for bit.
    """
    if device.type == "cuda":
        for parameter in model.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


def _checked_state(
    checkpoint: Checkpoint, what: str, expected: State, rules: Rules | None, dtype: torch.dtype, device: torch.device
) -> StoredState:
    """Return the tensors of a checkpoint by our names. Raises: ValueError unless it holds `expected`.

    `expected` has the names of the checkpoint's own layout, so that a message quotes the keys of the file.
    """
    checkpoint.check(what, {name: tensor.shape for name, tensor in expected.items()})
    parts = diffusers_pieces(rules, expected) if rules else None
    return StoredState(checkpoint, dtype, device, parts=parts)


def diffusers_pieces(rules: Rules, names: Mapping[str, object]) -> dict[str, Pieces]:
    """Return for each of our tensors its pieces in a diffusers checkpoint with these keys."""
    return {rule.original: Pieces(rule.diffusers, rule.join) for rule in rules(names) if rule.diffusers[0] in names}


# Weights must not become inference tensors when the caller is in inference mode: LoRAs change weights outside of it.
@torch.inference_mode(False)
@torch.no_grad()
def load_weights(model: _Module, state: StoredState, prepare: Prepare | None = None) -> _Module:
    """Load the weights of a module on meta, and return it ready for inference."""
    if prepare is not None:
        prepare(model)
    for prefix, module in model.named_modules():
        if isinstance(module, SelfLoading):
            module.load_from(state, prefix)
            continue
        for name, _ in list(module.named_parameters(recurse=False)):
            tensor = state[f"{prefix}.{name}" if prefix else name]
            module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    # Unfusing a LoRA reads the weights from here again, so the files stay mapped.
    model.stored = state  # type: ignore[assignment]
    return model.requires_grad_(False).eval()


@contextmanager
def naming_errors(checkpoint: Checkpoint, what: str) -> Iterator[None]:
    """Run the block and put the checkpoint's name before the message of every ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{checkpoint.source} does not hold {what}: {error}") from error
