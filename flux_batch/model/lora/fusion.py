"""LoRAs in the weights of a model: fused with one rounding, unfused bit for bit.

A fused weight is computed from the unfused one: dense in fp32, plus the sum of all changes, rounded once to its dtype
(or quantized once, if it is kept in fp8). Rounding errors do not accumulate: the same LoRAs give the same bits,
whatever was fused before.

The unfused weight is read again from the model's file, which stays mapped. A copy would take up to 23 GB of host memory
for a 12 B model, more than many hosts can spare, while all workers of a machine share the pages of a file. Only a
weight that differs from the file, because the program has changed it since loading, is kept in memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flux_batch.model.checkpoint.lazy_state import StoredState
from flux_batch.model.checkpoint.loading import SelfLoading
from flux_batch.model.lora.file import Change, Lora
from flux_batch.model.optimize.dtypes import without_autocast
from flux_batch.model.optimize.quantize import Fp8Linear, to_fp8
from flux_batch.model.params import Shapes

# The part of a model and the name of a layer in it.
_LayerKey = tuple[str, str]
# The tensors of a layer by name.
_LayerTensors = Mapping[str, Tensor]

_turns = Lock()


class LoraFusion:
    """The LoRAs that are fused into the parts of a model."""

    def __init__(self) -> None:
        self.parts: dict[str, nn.Module] = {}
        self.fused: tuple[tuple[Lora, float], ...] = ()
        # The unfused tensors of each changed layer; None if they equal those of the model's file.
        self._originals: dict[_LayerKey, _LayerTensors | None] = {}

    def add_part(self, part: str, module: nn.Module) -> None:
        """Add or replace a part (transformer, clip, t5), and fuse the current LoRAs into it."""
        self._originals = {layer_key: tensors for layer_key, tensors in self._originals.items() if layer_key[0] != part}
        self.parts[part] = module
        if self.fused:
            self.fuse(self.fused)

    def shapes(self) -> dict[str, Shapes]:
        """Return the shapes of all parameters, by part."""
        return {part: dict(_parameter_shapes(module)) for part, module in self.parts.items()}

    @torch.inference_mode(False)
    @torch.no_grad()
    def fuse(self, loras: Sequence[tuple[Lora, float]]) -> None:
        """Fuse these LoRAs, each with its scale, and unfuse all others.

        Their order does not matter. After an error no LoRA is fused. Raises: ValueError for weights that overflow.
        """
        wanted: dict[_LayerKey, list[tuple[Change, float]]] = defaultdict(list)
        # Sums of floats depend on their order; sorting makes images independent of it.
        for lora, scale in sorted(loras, key=lambda each: (each[0].name, each[1])):
            for change in lora.changes if scale else ():
                wanted[change.target.part, change.target.layer].append((change, scale))
        self.fused = ()
        try:
            for layer_key in [layer_key for layer_key in self._originals if layer_key not in wanted]:
                self._unfuse(layer_key)
            with _exact_matmul(), without_autocast():
                for layer_key, changes in wanted.items():
                    self._fuse(layer_key, changes)
        except BaseException:
            for layer_key in list(self._originals):
                self._unfuse(layer_key)
            raise
        self.fused = tuple(loras)

    def _fuse(self, layer_key: _LayerKey, changes: Sequence[tuple[Change, float]]) -> None:
        layer, state = self._layer(layer_key)
        if layer_key in self._originals:
            _assign_tensors(layer, self._original(layer_key))
        else:
            self._originals[layer_key] = _tensors_to_keep(layer, state, layer_key[1])
        fused = fused_tensors(layer, changes)
        for name, tensor in fused.items():
            # fp8 tensors need no check: their overflow shows in the fp32 scales.
            if tensor.dtype.itemsize > 1 and not tensor.isfinite().all():
                what = f"{layer_key[0]}'s {layer_key[1]}.{name} overflows in {str(tensor.dtype).removeprefix('torch.')}"
                raise ValueError(f"{what} with these LoRAs and scales: use smaller scales")
        _assign_tensors(layer, fused)

    def _unfuse(self, layer_key: _LayerKey) -> None:
        _assign_tensors(self._layer(layer_key)[0], self._original(layer_key))
        del self._originals[layer_key]

    def _original(self, layer_key: _LayerKey) -> _LayerTensors:
        kept = self._originals[layer_key]
        if kept is not None:
            return kept
        layer, state = self._layer(layer_key)
        assert state is not None  # without a file, the tensors would have been kept in memory
        return _reload_tensors(layer, state, layer_key[1])

    def _layer(self, layer_key: _LayerKey) -> tuple[nn.Module, StoredState | None]:
        module = self.parts[layer_key[0]]
        return module.get_submodule(layer_key[1]), getattr(module, "stored", None)


def _parameter_shapes(module: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of every tensor that a LoRA can change, buffers included: fp8 weights are buffers."""
    for prefix, layer in module.named_modules():
        for name, tensor in _tensors_of(layer).items():
            yield f"{prefix}.{name}" if prefix else name, tuple(tensor.shape)


def _tensors_of(layer: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a layer itself, without its children."""
    return {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}


def _tensors_to_keep(layer: nn.Module, state: StoredState | None, name: str) -> _LayerTensors | None:
    """Return the tensors of an unfused layer on the CPU; None if the model's file has equal ones."""
    own = _tensors_of(layer)
    if state is not None and _same_tensors(own, _reload_tensors(layer, state, name)):
        return None
    # On the CPU this makes no copy, and needs none: `_assign_tensors` replaces tensors there.
    return {key: tensor.detach().cpu() for key, tensor in own.items()}


def _reload_tensors(layer: nn.Module, state: StoredState, name: str) -> _LayerTensors:
    """Read the tensors of the layer `name` in the way that loading the model does."""
    own = _tensors_of(layer)
    if not isinstance(layer, SelfLoading):
        return {key: state[f"{name}.{key}"] for key in own if f"{name}.{key}" in state}
    try:
        layer.load_from(state, name)
        return _tensors_of(layer)
    finally:
        for key, tensor in own.items():
            setattr(layer, key, tensor)


def _same_tensors(these: _LayerTensors, those: _LayerTensors) -> bool:
    """Return whether two layers hold the same tensors, bit for bit."""
    return these.keys() == those.keys() and all(_same_bits(these[key], those[key]) for key in these)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are bitwise equal: NaN equals NaN, and 0 differs from -0."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    first, second = (tensor.detach().to(a.device).reshape(-1).view(torch.uint8) for tensor in (a, b))
    return torch.equal(first, second)


def fused_tensors(layer: nn.Module, changes: Sequence[tuple[Change, float]]) -> _LayerTensors:
    """Return the changed tensors of a layer: `changes` applied to its unfused tensors."""
    tensors: dict[str, Tensor] = {}
    for name in dict.fromkeys(change.parameter for change, _ in changes):
        own: Tensor = getattr(layer, name)
        quantized = layer if isinstance(layer, Fp8Linear) and name == "weight" else None
        wide = torch.float32 if quantized else torch.promote_types(own.dtype, torch.float32)
        original = quantized.dense(wide) if quantized else own.detach().to(wide)
        own_changes = [(change, scale) for change, scale in changes if change.parameter == name]
        original = _with_columns(_replaced(original, [change for change, _ in own_changes]), own_changes)
        total = torch.zeros_like(original)
        for change, scale in own_changes:
            if not change.replaces:
                change.add_to(total, original, scale)
        total += original
        if quantized:
            tensors["weight"], tensors["weight_scale"] = to_fp8(total)
        else:
            tensors[name] = total.to(own.dtype)
    return tensors


def _replaced(original: Tensor, changes: Sequence[Change]) -> Tensor:
    """Return the value that a change sets, or the original. Raises: ValueError if two changes set it."""
    setting = [change for change in changes if change.replaces]
    if len(setting) > 1:
        raise ValueError(f"two control LoRAs both set {setting[0].target.layer}: use one at a time")
    return setting[0].value(original) if setting else original


def _with_columns(original: Tensor, changes: Sequence[tuple[Change, float]]) -> Tensor:
    """Return a matrix widened with zeros to the columns of the widest change."""
    width = max((change.num_columns or 0 for change, _ in changes), default=0)
    if original.ndim != 2 or width <= original.shape[1]:
        return original
    return F.pad(original, (0, width - original.shape[1]))


def _assign_tensors(layer: nn.Module, tensors: _LayerTensors) -> None:
    """Assign tensors to a layer.

    On a GPU they are copied into the old ones, since compiled code and CUDA graphs keep addresses. On the CPU the old
    tensors may share memory with the model's file or with the kept unfused tensors, so they are replaced. A widened
    matrix is replaced everywhere.
    """
    for name, tensor in tensors.items():
        own: Tensor = getattr(layer, name)
        if own.device.type != "cpu" and own.dtype == tensor.dtype and own.shape == tensor.shape:
            own.copy_(tensor)
        elif isinstance(own, nn.Parameter):
            # Convert to the model's current dtype, which may have changed since the weights were read.
            own.data = tensor.to(own)
        else:
            setattr(layer, name, tensor.to(own.device))


@contextmanager
def _exact_matmul() -> Iterator[None]:
    """Run the block with fp32 matmuls in full precision, whatever the program has set.

    Sets the attributes of the backends, since torch's older switch fails in a program that uses these newer ones. All
    threads share the attributes, so a lock keeps one thread from restoring the values that another has set.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    with _turns:
        before = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision
