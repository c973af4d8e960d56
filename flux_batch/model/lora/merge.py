"""LoRAs in the weights of a model: merged in one rounding, taken out bit for bit.

A weight is computed from what it was without LoRAs, never from a merged one: dense in fp32, plus the sum of all
changes, rounded once to its dtype (or quantised once, if it is kept in fp8). So nothing piles up, and the same LoRAs
give the same bits whatever was merged before.

What it was is read again from the model's file, which stays mapped: the LoRAs of a 12 B model touch up to 23 GB, more
than many a host has to spare beside a GPU, and pages of a file are shared by all workers of a machine. Only a weight
that is not what the file says, as somebody has changed it, is kept in memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flux_batch.model.checkpoint.lazy_state import StoredState
from flux_batch.model.checkpoint.loading import ReadsItself
from flux_batch.model.lora.file import Change, Lora
from flux_batch.model.optimize.quantize import Fp8Linear, to_fp8
from flux_batch.model.params import Shapes

# A layer: the part it is of, and its name there.
Place = tuple[str, str]
# The tensors of one layer, by their names in it.
Tensors = Mapping[str, Tensor]


class LoraMerge:
    """The LoRAs that are merged into the parts of a model now, and how to take them out."""

    def __init__(self) -> None:
        self.parts: dict[str, nn.Module] = {}
        self.merged: tuple[tuple[Lora, float], ...] = ()
        # Of each layer that is changed: its own tensors, or None if they are in the model's file.
        self._originals: dict[Place, Tensors | None] = {}

    def add_part(self, part: str, module: nn.Module) -> None:
        """Take in a part (transformer, clip, t5), or another in its place; it gets what is merged."""
        self._originals = {place: tensors for place, tensors in self._originals.items() if place[0] != part}
        self.parts[part] = module
        if self.merged:
            self.set(self.merged)

    def shapes(self) -> dict[str, Shapes]:
        """Return the shapes of all parameters, by part."""
        return {part: dict(parameter_shapes(module)) for part, module in self.parts.items()}

    @torch.no_grad()
    def set(self, loras: Sequence[tuple[Lora, float]]) -> None:
        """Make these LoRAs, each with its scale, the ones that are merged; none takes all out.

        Their order does not matter. What fails leaves none merged. Raises: ValueError for weights that overflow.
        """
        wanted: dict[Place, list[tuple[Change, float]]] = defaultdict(list)
        # Sums of floats depend on their order, images should not.
        for lora, scale in sorted(loras, key=lambda each: (each[0].name, each[1])):
            for change in lora.changes if scale else ():
                wanted[change.target.part, change.target.layer].append((change, scale))
        self.merged = ()
        try:
            for place in [place for place in self._originals if place not in wanted]:
                self._take_out(place)
            with exact_products():
                for place, changes in wanted.items():
                    self._merge(place, changes)
        except BaseException:
            for place in list(self._originals):
                self._take_out(place)
            raise
        self.merged = tuple(loras)

    def _merge(self, place: Place, changes: Sequence[tuple[Change, float]]) -> None:
        layer, state = self._layer(place)
        if place in self._originals:
            put(layer, self._original(place))
        else:
            self._originals[place] = what_to_keep(layer, state, place[1])
        merged = merged_tensors(layer, changes)
        for name, tensor in merged.items():
            # Of fp8 the scales tell.
            if tensor.dtype.itemsize > 1 and not tensor.isfinite().all():
                what = f"{place[0]}'s {place[1]}.{name} overflows in {str(tensor.dtype).removeprefix('torch.')}"
                raise ValueError(f"with these LoRAs at these scales {what}: take smaller scales")
        put(layer, merged)

    def _take_out(self, place: Place) -> None:
        put(self._layer(place)[0], self._original(place))
        del self._originals[place]

    def _original(self, place: Place) -> Tensors:
        kept = self._originals[place]
        if kept is not None:
            return kept
        layer, state = self._layer(place)
        assert state is not None  # else it would have been kept
        return read_again(layer, state, place[1])

    def _layer(self, place: Place) -> tuple[nn.Module, StoredState | None]:
        module = self.parts[place[0]]
        return module.get_submodule(place[1]), getattr(module, "stored", None)


def parameter_shapes(module: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of everything that may be changed, once; fp8 weights are buffers."""
    for prefix, layer in module.named_modules():
        for name, tensor in tensors_of(layer).items():
            yield f"{prefix}.{name}" if prefix else name, tuple(tensor.shape)


def tensors_of(layer: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a layer itself."""
    return {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}


def what_to_keep(layer: nn.Module, state: StoredState | None, name: str) -> Tensors | None:
    """Return a layer's tensors on the CPU, or None if the file has the same."""
    own = tensors_of(layer)
    if state is not None and same_tensors(own, read_again(layer, state, name)):
        return None
    # On the CPU no copy is made: `put` replaces tensors there.
    return {key: tensor.detach().cpu() for key, tensor in own.items()}


def read_again(layer: nn.Module, state: StoredState, name: str) -> Tensors:
    """Return the tensors of the layer called `name` as they are read when the model is loaded."""
    own = tensors_of(layer)
    if not isinstance(layer, ReadsItself):
        return {key: state[f"{name}.{key}"] for key in own if f"{name}.{key}" in state}
    try:
        layer.read_stored(state, name)
        return tensors_of(layer)
    finally:
        for key, tensor in own.items():
            setattr(layer, key, tensor)


def same_tensors(these: Tensors, those: Tensors) -> bool:
    """Tell whether two layers hold the same, bit for bit."""
    return these.keys() == those.keys() and all(same_bits(these[key], those[key]) for key in these)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors are the same, NaN and the sign of 0 included."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    first, second = (tensor.detach().to(a.device).reshape(-1).view(torch.uint8) for tensor in (a, b))
    return torch.equal(first, second)


def merged_tensors(layer: nn.Module, changes: Sequence[tuple[Change, float]]) -> Tensors:
    """Return the tensors that changes make of a layer without any: only those that are others."""
    tensors: dict[str, Tensor] = {}
    for name in dict.fromkeys(change.parameter for change, _ in changes):
        own: Tensor = getattr(layer, name)
        quantized = layer if isinstance(layer, Fp8Linear) and name == "weight" else None
        wide = torch.float32 if quantized else torch.promote_types(own.dtype, torch.float32)
        original = quantized.dense(wide) if quantized else own.detach().to(wide)
        total = torch.zeros_like(original)
        for change, scale in changes:
            if change.parameter == name:
                change.add_to(total, original, scale)
        total += original
        if quantized:
            tensors["weight"], tensors["weight_scale"] = to_fp8(total)
        else:
            tensors[name] = total.to(own.dtype)
    return tensors


def put(layer: nn.Module, tensors: Tensors) -> None:
    """Give a layer other tensors.

    On a device they go where the old ones are, as compiled code and CUDA graphs remember places. On the CPU the old
    ones may be pages of the model's file, or what is to be put back: they are replaced.
    """
    for name, tensor in tensors.items():
        own: Tensor = getattr(layer, name)
        if own.device.type != "cpu" and own.dtype == tensor.dtype:
            own.copy_(tensor)
        elif isinstance(own, nn.Parameter):
            # Of the dtype that the model has now, should somebody have changed it since it was read.
            own.data = tensor.to(own)
        else:
            setattr(layer, name, tensor.to(own.device))


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply fp32 in fp32 inside, whatever precision the program allows elsewhere.

    Set where torch's older and newer ways to allow others meet: the older one fails in a program that uses the newer.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
