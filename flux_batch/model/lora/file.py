"""A LoRA file: what it adds to which weights of a model, computed when asked for; changes no weight.

    weight + scale * (alpha / rank) * up @ down         LoRA, arXiv 2106.09685
    up @ down becomes (a1 @ b1) * (a2 @ b2)             LoHa, arXiv 2108.06098
    up @ down becomes kron(a1 @ b1, a2 @ b2)            LoKr, arXiv 2212.10650; alpha counts if one of them is a product
    weight + scale * (magnitude * direction - weight)   DoRA, arXiv 2402.09353, around any of the above
    weight + scale * diff                               a difference as it is, of norms and biases too

All in fp32, and against the model's own weight whatever else is merged: what several LoRAs add is a sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flux_batch.model.checkpoint.checkpoint import READABLE, Checkpoint, listing, open_checkpoint
from flux_batch.model.checkpoint.diffusers_keys import swap_halves
from flux_batch.model.checkpoint.lazy_state import StoredState
from flux_batch.model.lora.keys import LoraModule, Target, find_modules
from flux_batch.model.lora.scale import Scales
from flux_batch.model.params import Shapes

Shape = tuple[int, ...]

# The roles that make up a kind; a factor of LoKr is there whole or as a product.
KINDS = {
    "lora": ({"down", "up"},),
    "loha": ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},),
    "lokr": tuple(
        {*first, *second}
        for first in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for second in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    ),
    "diff": ({"diff"},),
}
# Of each kind, what has the rank as its first dimension.
RANKED = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")


@dataclass(frozen=True, slots=True)
class Change:
    """What one module of a LoRA adds to one parameter of a layer.

    `parameter`: weight, scale or bias; `keys`: its tensors in the file, by role; `alpha_over_rank`: what the product of
    them is multiplied by.
    """

    target: Target
    parameter: str
    keys: Mapping[str, str]
    alpha_over_rank: float
    state: StoredState

    def add_to(self, total: Tensor, original: Tensor, scale: float) -> None:
        """Add `scale` times the change to `total`, given the parameter without any; both whole and in fp32 or wider."""
        if abs(scale * self.alpha_over_rank) > torch.finfo(torch.float32).max:
            raise ValueError(f"a scale of {scale} is too large for the LoRA's {next(iter(self.keys.values()))}")
        rows = slice(*self.target.rows) if self.target.rows else slice(None)
        own = original[rows]
        factors = {role: self.state[key].to(own) for role, key in self.keys.items()}
        magnitude = factors.pop("magnitude", None)
        change, factor = product(factors), self.alpha_over_rank
        if magnitude is not None:
            # In the order in which the module counts its rows.
            own = swap_halves(own) if self.target.swaps_halves else own
            change, factor = redirected(own, factor * change, magnitude), 1.0
        total[rows].add_(swap_halves(change) if self.target.swaps_halves else change, alpha=scale * factor)


@dataclass(frozen=True, slots=True)
class Lora:
    """The changes that a LoRA file makes to a model; `name` is what it was asked for by."""

    name: str
    changes: tuple[Change, ...]


def open_lora(path: Path, name: str, parts: Mapping[str, Shapes]) -> Lora:
    """Open a LoRA for a model with parameters of these shapes, by part. Maps the file, and looks at every number once.

    A module whose alpha is 0 changes nothing. Raises: ValueError naming what the file is instead, the keys that match
    nothing, are incomplete, of another shape or not finite.
    """
    checkpoint = open_checkpoint(path)
    state = StoredState(checkpoint, torch.float32, torch.device("cpu"))
    scales = Scales(checkpoint)
    changes: list[Change] = []
    for module in find_modules(checkpoint.source, checkpoint.tensors, parts):
        shapes = parts[module.target.part]
        for change in changes_of(module, checkpoint, state, scales, shapes):
            check_change(checkpoint, change, shapes)
            check_numbers(checkpoint, change)
            changes.append(change)
    return Lora(name, tuple(each for each in changes if each.alpha_over_rank or "magnitude" in each.keys))


def changes_of(
    module: LoraModule, checkpoint: Checkpoint, state: StoredState, scales: Scales, shapes: Shapes
) -> Iterator[Change]:
    """Yield what a module changes: its layer's weight, its bias, or both. Raises: ValueError."""
    keys = dict(module.keys)
    alpha, bias, diff_b = keys.pop("alpha", None), keys.pop("bias", None), keys.pop("diff_b", None)
    check_whole(checkpoint, module, keys, has_bias=bool(bias), has_diff_b=bool(diff_b))
    check_readable(checkpoint, [key for key in module.keys.values() if key != alpha])
    target, factor = module.target, 1.0
    if rank_of := next((keys[role] for role in RANKED if role in keys), None):
        rank = rank_in(checkpoint, rank_of)
        factor = scales.alpha_over_rank(module.stem, rank, read_number(checkpoint, state, alpha) if alpha else None)
        if scales.is_of_split_layers and "up" in keys and is_block_diagonal(state[keys["up"]], target.pieces):
            factor *= len(target.pieces)
    elif "lokr_w1" in keys:
        factor = scales.stated_alpha_over_rank(module.stem)
    if keys:
        parameter = "weight" if f"{target.layer}.weight" in shapes else "scale"
        yield Change(target, parameter, keys, factor, state)
    if bias:
        yield Change(target, "bias", {"diff": bias}, factor, state)
    if diff_b:
        yield Change(target, "bias", {"diff": diff_b}, 1.0, state)


def redirected(weight: Tensor, change: Tensor, magnitude: Tensor) -> Tensor:
    """Return the change that DoRA makes of one: the sum goes in its direction as far as the magnitude says.

    magnitude: one an output, (o,) or (o, 1), as PEFT; or one an input, (1, i), as LyCORIS once did.
    """
    moved = weight + change
    dim = 0 if magnitude.ndim == 2 and len(magnitude) == 1 else 1
    length = moved.norm(dim=dim, keepdim=True).clamp(min=torch.finfo(moved.dtype).tiny)
    return magnitude.view_as(length) / length * moved - weight


def product(factors: Mapping[str, Tensor]) -> Tensor:
    """Return what the tensors of a module, by role, amount to, without alpha, rank and magnitude."""
    if "diff" in factors:
        return factors["diff"]
    if "up" in factors:
        return factors["up"] @ factors["down"]
    if "hada_w1_a" in factors:
        first = factors["hada_w1_a"] @ factors["hada_w1_b"]
        second = factors["hada_w2_a"] @ factors["hada_w2_b"]
        if first.shape != second.shape:
            raise ValueError("its two products are not of one shape")
        return first * second
    first, second = (
        factors[name] if name in factors else factors[f"{name}_a"] @ factors[f"{name}_b"]
        for name in ("lokr_w1", "lokr_w2")
    )
    return torch.kron(first, second)


def check_whole(
    checkpoint: Checkpoint, module: LoraModule, keys: Mapping[str, str], *, has_bias: bool, has_diff_b: bool
) -> None:
    """Raise ValueError unless the keys of a module, but for those of biases, make up one kind."""
    roles = set(keys) - {"magnitude"}
    is_kind = any(roles == combination for combinations in KINDS.values() for combination in combinations)
    if has_bias and roles != {"down", "up"}:
        is_kind = False
    if "magnitude" in keys and "diff" in keys:
        is_kind = False
    if not is_kind and (keys or has_bias or not has_diff_b):
        found = listing(list(module.keys.values()), limit=6)
        raise ValueError(f"{checkpoint.source}: {module.stem} is not a whole module of a LoRA: it has only {found}")


def check_change(checkpoint: Checkpoint, change: Change, shapes: Shapes) -> None:
    """Raise ValueError unless a change fits the parameter it is for, and can be read."""
    target, tensors = change.target, {role: checkpoint.tensors[key] for role, key in change.keys.items()}
    name = f"{target.layer}.{change.parameter}"
    keys = listing(list(change.keys.values()), limit=6)
    if name not in shapes:
        raise ValueError(f"{checkpoint.source}: {keys} is for {name}, which this model does not have")
    rows, *columns = shapes[name]
    expected = (target.rows[1] - target.rows[0] if target.rows else rows, *columns)
    try:
        # On meta nothing is computed but the shape.
        factors = {role: torch.empty(tensor.shape, device="meta") for role, tensor in tensors.items()}
        magnitude = factors.pop("magnitude", None)
        shape = tuple(product(factors).shape)
    except RuntimeError as error:
        raise ValueError(f"{checkpoint.source}: {keys} do not fit together") from error
    if shape != expected:
        variant = "it is for a variant of FLUX.1 with more input (Fill, Canny, Depth)"
        hint = f"; {variant if target.layer == 'img_in' else 'is it for another model?'}"
        raise ValueError(
            f"{checkpoint.source}: {keys} make up {list(shape)}, and {name} is {list(expected)} here{hint}"
        )
    if magnitude is not None and tuple(magnitude.shape) not in (expected[:1], (expected[0], 1), (1, expected[1])):
        raise ValueError(f"{checkpoint.source}: {change.keys['magnitude']} does not fit {name}")


def check_numbers(checkpoint: Checkpoint, change: Change) -> None:
    """Raise ValueError if a tensor of a change has numbers that are not finite."""
    for key in change.keys.values():
        if not change.state[key].isfinite().all():
            raise ValueError(f"{checkpoint.source}: {key} is not finite: the file is damaged, or its training was")


def check_readable(checkpoint: Checkpoint, keys: Sequence[str]) -> None:
    """Raise ValueError for tensors of a type that is not supported."""
    if unreadable := [
        f"{key} ({checkpoint.tensors[key].dtype})" for key in keys if checkpoint.tensors[key].dtype not in READABLE
    ]:
        raise ValueError(f"{checkpoint.source}: of a type that is not supported: {listing(unreadable)}")


def rank_in(checkpoint: Checkpoint, key: str) -> int:
    """Return the rank, which is the number of rows of the tensor. Raises: ValueError if it is no matrix."""
    shape = checkpoint.tensors[key].shape
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{checkpoint.source}: {key} is {list(shape)}, should be a matrix")
    return shape[0]


def read_number(checkpoint: Checkpoint, state: StoredState, key: str) -> float:
    """Return a tensor of one number. Raises: ValueError if it is none."""
    if math.prod(checkpoint.tensors[key].shape) != 1:
        raise ValueError(f"{checkpoint.source}: {key} is {list(checkpoint.tensors[key].shape)}, should be one number")
    return float(state[key])


def is_block_diagonal(up: Tensor, pieces: tuple[int, ...]) -> bool:
    """Tell whether rows in groups of these sizes use columns of their own: `up` (o, r)."""
    if len(pieces) < 2 or up.shape[1] % len(pieces) or len(up) != sum(pieces):
        return False
    blocks = [torch.ones(rows, up.shape[1] // len(pieces), dtype=torch.bool) for rows in pieces]
    return not up[~torch.block_diag(*blocks).bool()].any()
