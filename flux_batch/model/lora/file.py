"""A LoRA file as changes of a model's weights, computed on demand; no weight is changed here.

    weight + scale * (alpha / rank) * up @ down         LoRA, arXiv 2106.09685
    up @ down becomes (a1 @ b1) * (a2 @ b2)             LoHa, arXiv 2108.06098
    up @ down becomes kron(a1 @ b1, a2 @ b2)            LoKr, arXiv 2212.10650; alpha counts if one of them is a product
    weight + scale * (magnitude * direction - weight)   DoRA, arXiv 2402.09353, around any of the above
    weight + scale * diff                               a full difference, of norms and biases too
    set                                                 norm scales of BFL's control LoRAs, whatever the scale

A LoRA of `img_in` with fewer columns than the model changes only the first columns. A control LoRA for a text-to-image
model has twice as many columns, and the model's weight is first widened with columns of zeros.
Every change is computed in fp32 from the model's weight without any LoRA, so the changes of several LoRAs add up.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flux_batch.model.checkpoint.checkpoint import READABLE_DTYPES, Checkpoint, first_names, open_checkpoint
from flux_batch.model.checkpoint.diffusers_keys import swap_halves
from flux_batch.model.checkpoint.lazy_state import StoredState
from flux_batch.model.lora.keys import LoraModule, Target, find_modules
from flux_batch.model.lora.scale import Scales
from flux_batch.model.params import Shapes

_Shape = tuple[int, ...]

log = logging.getLogger(__name__)

# The roles of tensors that make up each kind of module; a factor of LoKr is one tensor or the product of two.
_ROLES_OF_KIND = {
    "lora": ({"down", "up"},),
    "loha": ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},),
    "lokr": tuple(
        {*first, *second}
        for first in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for second in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    ),
    "diff": ({"diff"},),
    "set": ({"set"},),
}
# Roles whose tensor has the rank as its first dimension.
_ROLES_WITH_RANK = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")


@dataclass(frozen=True, slots=True)
class Change:
    """The change that one module of a LoRA makes to one parameter of a layer.

    `parameter`: weight, scale or bias; `keys`: the module's tensors in the file, by role; `alpha_over_rank`: the factor
    of their product; `num_columns`: the columns of that product.
    """

    target: Target
    parameter: str
    keys: Mapping[str, str]
    alpha_over_rank: float
    state: StoredState
    num_columns: int | None = None

    @property
    def replaces(self) -> bool:
        """True if the change sets the parameter instead of adding to it."""
        return "set" in self.keys

    def value(self, like: Tensor) -> Tensor:
        """Return the value that the parameter is set to, in the dtype of `like`."""
        return self.state[self.keys["set"]].to(like)

    def add_to(self, total: Tensor, original: Tensor, scale: float) -> None:
        """Add `scale` times the change to `total`; `original` is the parameter without LoRAs. Both in fp32 or wider."""
        if abs(scale * self.alpha_over_rank) > torch.finfo(torch.float32).max:
            raise ValueError(f"a scale of {scale} is too large for the LoRA's {next(iter(self.keys.values()))}")
        rows = slice(*self.target.rows) if self.target.rows else slice(None)
        own = original[rows] if self.num_columns is None else original[rows, : self.num_columns]
        factors = {role: self.state[key].to(own) for role, key in self.keys.items()}
        magnitude = factors.pop("magnitude", None)
        change, factor = _delta(factors), self.alpha_over_rank
        if magnitude is not None:
            # The magnitude has its rows in the order of the module.
            own = swap_halves(own) if self.target.swaps_halves else own
            change, factor = _dora_delta(own, factor * change, magnitude), 1.0
        part = total[rows] if self.num_columns is None else total[rows, : self.num_columns]
        part.add_(swap_halves(change) if self.target.swaps_halves else change, alpha=scale * factor)


@dataclass(frozen=True, slots=True)
class Lora:
    """The changes that a LoRA file makes to a model; `name` is the address that the user gave.

    version: differs for another file that is written in its place.
    """

    name: str
    changes: tuple[Change, ...]
    version: tuple[Hashable, ...]

    @property
    def num_columns(self) -> int:
        """The number of columns of `img_in` that it changes; in a control LoRA twice the noisy channels."""
        inputs = (change for change in self.changes if change.target.layer == "img_in")
        return max((change.num_columns or 0 for change in inputs), default=0)


def open_lora(path: Path, name: str, parts: Mapping[str, Shapes]) -> Lora:
    """Read a LoRA for a model with parameters of these shapes, by part. Maps the file, and checks every number once.

    A module whose alpha is 0 or that has only an alpha changes nothing. Raises: ValueError for another kind of file, or
    for keys that match nothing, are incomplete, of another shape or not finite.
    """
    checkpoint = open_checkpoint(path)
    version = tuple(map(_version_of, sorted({tensor.path for tensor in checkpoint.tensors.values()})))
    state = StoredState(checkpoint, torch.float32, torch.device("cpu"))
    scales = Scales(checkpoint)
    changes: list[Change] = []
    for module in find_modules(checkpoint.source, checkpoint.tensors, parts):
        if set(module.keys) == {"alpha"}:
            log.info("%s: %s has an alpha and no matrices, and changes nothing", name, module.stem)
            continue
        shapes = parts[module.target.part]
        for change in _changes_of(module, checkpoint, state, scales, shapes):
            _check_change(checkpoint, change, shapes)
            _check_numbers(checkpoint, change)
            changes.append(change)
    return Lora(name, tuple(each for each in changes if each.alpha_over_rank or "magnitude" in each.keys), version)


def _version_of(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _changes_of(
    module: LoraModule, checkpoint: Checkpoint, state: StoredState, scales: Scales, shapes: Shapes
) -> Iterator[Change]:
    """Yield the changes of a module: to its layer's weight, its bias, or both. Raises: ValueError."""
    keys = dict(module.keys)
    alpha, bias, diff_b = keys.pop("alpha", None), keys.pop("bias", None), keys.pop("diff_b", None)
    _check_complete(checkpoint, module, keys, has_bias=bool(bias), has_diff_b=bool(diff_b))
    _check_readable(checkpoint, [key for key in module.keys.values() if key != alpha])
    target, factor = module.target, 1.0
    if rank_of := next((keys[role] for role in _ROLES_WITH_RANK if role in keys), None):
        rank = _rank_in(checkpoint, rank_of)
        factor = scales.alpha_over_rank(module.stem, rank, _read_number(checkpoint, state, alpha) if alpha else None)
        if scales.is_of_split_layers and "up" in keys and _is_block_diagonal(state[keys["up"]], target.pieces):
            factor *= len(target.pieces)
    elif "lokr_w1" in keys:
        factor = scales.stated_alpha_over_rank(module.stem)
    if keys:
        parameter = "weight" if f"{target.layer}.weight" in shapes else "scale"
        columns = checkpoint.tensors[keys["down"]].shape[-1] if "up" in keys and "down" in keys else None
        yield Change(target, parameter, keys, factor, state, columns)
    if bias:
        yield Change(target, "bias", {"diff": bias}, factor, state)
    if diff_b:
        yield Change(target, "bias", {"diff": diff_b}, 1.0, state)


def _dora_delta(weight: Tensor, change: Tensor, magnitude: Tensor) -> Tensor:
    """Return the change of DoRA: the changed weight, normalized and times the magnitude, minus the weight.

    weight, change: (o, i). magnitude: one number for each output, (o,) or (o, 1), as in PEFT; or one for each input,
    (1, i), as in older LyCORIS.
    """
    moved = weight + change
    dim = 0 if magnitude.ndim == 2 and len(magnitude) == 1 else 1
    length = moved.norm(dim=dim, keepdim=True).clamp(min=torch.finfo(moved.dtype).tiny)
    return magnitude.view_as(length) / length * moved - weight


def _delta(factors: Mapping[str, Tensor]) -> Tensor:
    """Return the product of a module's tensors (by role), without alpha, rank and magnitude."""
    if "diff" in factors:
        return factors["diff"]
    if "set" in factors:
        return factors["set"]
    if "up" in factors:
        return factors["up"] @ factors["down"]
    if "hada_w1_a" in factors:
        first = factors["hada_w1_a"] @ factors["hada_w1_b"]
        second = factors["hada_w2_a"] @ factors["hada_w2_b"]
        if first.shape != second.shape:
            raise ValueError("its two LoHa products differ in shape")
        return first * second
    first, second = (
        factors[name] if name in factors else factors[f"{name}_a"] @ factors[f"{name}_b"]
        for name in ("lokr_w1", "lokr_w2")
    )
    return torch.kron(first, second)


def _check_complete(
    checkpoint: Checkpoint, module: LoraModule, keys: Mapping[str, str], *, has_bias: bool, has_diff_b: bool
) -> None:
    """Raise ValueError unless the keys of a module make up one kind. Keys of biases are ignored."""
    roles = set(keys) - {"magnitude"}
    is_kind = any(roles == combination for combinations in _ROLES_OF_KIND.values() for combination in combinations)
    if has_bias and roles != {"down", "up"}:
        is_kind = False
    if "magnitude" in keys and "diff" in keys:
        is_kind = False
    if not is_kind and (keys or has_bias or not has_diff_b):
        found = first_names(list(module.keys.values()), limit=6)
        raise ValueError(f"{checkpoint.source}: {module.stem} is not a whole module of a LoRA: it has only {found}")


def _check_change(checkpoint: Checkpoint, change: Change, shapes: Shapes) -> None:
    """Raise ValueError unless a change has the shape of its parameter."""
    target, tensors = change.target, {role: checkpoint.tensors[key] for role, key in change.keys.items()}
    name = f"{target.layer}.{change.parameter}"
    keys = first_names(list(change.keys.values()), limit=6)
    if name not in shapes:
        raise ValueError(f"{checkpoint.source}: {keys} is for {name}, which this model does not have")
    rows, *columns = shapes[name]
    expected = (target.rows[1] - target.rows[0] if target.rows else rows, *columns)
    try:
        # On meta only the shape is computed.
        factors = {role: torch.empty(tensor.shape, device="meta") for role, tensor in tensors.items()}
        magnitude = factors.pop("magnitude", None)
        shape = tuple(_delta(factors).shape)
    except RuntimeError as error:
        raise ValueError(f"{checkpoint.source}: the shapes of {keys} do not match each other") from error
    if target.layer == "img_in" and _fits_some_columns(shape, expected, shapes) and magnitude is None:
        return
    if shape != expected:
        variant = "it is for a variant of FLUX.1 with more input (Fill, Canny, Depth)"
        hint = f"; {variant if target.layer == 'img_in' else 'is it for another model?'}"
        raise ValueError(
            f"{checkpoint.source}: {keys} give shape {list(shape)}, but {name} has {list(expected)} here{hint}"
        )
    if magnitude is not None and tuple(magnitude.shape) not in (expected[:1], (expected[0], 1), (1, expected[1])):
        raise ValueError(f"{checkpoint.source}: {change.keys['magnitude']} does not fit {name}")


def _fits_some_columns(shape: _Shape, expected: _Shape, shapes: Shapes) -> bool:
    """Return whether a change of `img_in` fits: the noisy columns, or also the control image's."""
    if len(shape) != 2 or len(expected) != 2 or shape[0] != expected[0]:
        return False
    out_channels = shapes["final_layer.linear.weight"][0]
    return shape[1] == out_channels or (shape[1] == 2 * out_channels and expected[1] == out_channels)


def _check_numbers(checkpoint: Checkpoint, change: Change) -> None:
    """Raise ValueError if a tensor of a change has numbers that are not finite."""
    for key in change.keys.values():
        if not change.state[key].isfinite().all():
            raise ValueError(f"{checkpoint.source}: {key} is not finite: the file is damaged, or its training diverged")


def _check_readable(checkpoint: Checkpoint, keys: Sequence[str]) -> None:
    """Raise ValueError for tensors of a type that is not supported."""
    if unreadable := [
        f"{key} ({checkpoint.tensors[key].dtype})"
        for key in keys
        if checkpoint.tensors[key].dtype not in READABLE_DTYPES
    ]:
        raise ValueError(f"{checkpoint.source}: some tensors have an unsupported dtype: {first_names(unreadable)}")


def _rank_in(checkpoint: Checkpoint, key: str) -> int:
    """Return the rank: the number of rows of a tensor. Raises: ValueError if it is not a matrix."""
    shape = checkpoint.tensors[key].shape
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{checkpoint.source}: {key} is {list(shape)}, should be a matrix")
    return shape[0]


def _read_number(checkpoint: Checkpoint, state: StoredState, key: str) -> float:
    """Read a tensor of one number. Raises: ValueError if it has another size."""
    if math.prod(checkpoint.tensors[key].shape) != 1:
        raise ValueError(f"{checkpoint.source}: {key} is {list(checkpoint.tensors[key].shape)}, should be one number")
    return float(state[key])


def _is_block_diagonal(up: Tensor, pieces: tuple[int, ...]) -> bool:
    """Return whether `up` (o, r) is block-diagonal with groups of rows of these sizes."""
    if len(pieces) < 2 or up.shape[1] % len(pieces) or len(up) != sum(pieces):
        return False
    blocks = [torch.ones(rows, up.shape[1] // len(pieces), dtype=torch.bool, device="cpu") for rows in pieces]
    return not up[~torch.block_diag(*blocks).bool()].any()
