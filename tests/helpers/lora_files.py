"""Random LoRA files of every family, and the expected weights, computed independently of the code.

A LoRA is a mapping of its family's module names to `Factors`. For the expected weights, each module is added separately
to a diffusers state dict.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from flux_batch.model.lora.file import open_lora
from flux_batch.model.lora.fusion import LoraFusion

State = Mapping[str, Tensor]
KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight"}
ALPHAS = (None, 4.0, 1.0, 0.0, 2.5)
DIFFUSERS_NAMES = {
    "diffusers": {"prefix": "transformer."},
    "peft": {"prefix": "base_model.model."},
    "peft with an adapter's name": {
        "prefix": "base_model.model.",
        "down": "lora_A.default.weight",
        "up": "lora_B.default.weight",
    },
    "no prefix": {},
    "diffusers with kohya's endings": {"prefix": "transformer.", **KOHYA},
    "old diffusers": {"prefix": "transformer.", "down": "lora.down.weight", "up": "lora.up.weight"},
    "onetrainer": {"prefix": "lora_transformer_", "underscores": True, **KOHYA},
    "lycoris": {"prefix": "lycoris_", "underscores": True, **KOHYA},
}
ORIGINAL_NAMES = {
    "kohya": {"prefix": "lora_unet_", "underscores": True, **KOHYA},
    "comfyui": {"prefix": "diffusion_model.", **KOHYA},
    "comfyui with peft's endings": {"prefix": "diffusion_model."},
    "original": {"prefix": ""},
    "fal": {"prefix": "base_model.model."},
}


@dataclass(frozen=True)
class Factors:
    """One module: down (r, i), up (o, r), alpha or None."""

    down: Tensor
    up: Tensor
    alpha: float | None = None

    @property
    def delta(self) -> Tensor:
        """The change of the weight at scale 1: (o, i), fp64."""
        alpha = len(self.down) if self.alpha is None else self.alpha
        return alpha / len(self.down) * (self.up.double() @ self.down.double())


def random_factors(
    shapes: Mapping[str, tuple[int, int]], seed: int = 0, alphas: Iterable[float | None] = (None,), max_rank: int = 6
) -> dict[str, Factors]:
    """Return random modules of random ranks for layers of shapes (o, i), with each of `alphas` in turn."""
    generator = torch.Generator().manual_seed(seed)
    choices = list(alphas)
    made = {}
    for number, (name, (rows, columns)) in enumerate(shapes.items()):
        rank = int(torch.randint(1, max_rank + 1, (), generator=generator))
        down = 0.3 * torch.randn(rank, columns, generator=generator)
        up = 0.3 * torch.randn(rows, rank, generator=generator)
        made[name] = Factors(down, up, choices[number % len(choices)])
    return made


def write_lora(
    path: Path,
    modules: Mapping[str, Factors],
    *,
    prefix: str = "",
    down: str = "lora_A.weight",
    up: str = "lora_B.weight",
    underscores: bool = False,
    dtype: torch.dtype = torch.float32,
    metadata: dict[str, str] | None = None,
    extra: State | None = None,
) -> Path:
    """Write modules with `prefix` before their names, and `extra` tensors unchanged."""
    state: dict[str, Tensor] = dict(extra or {})
    for name, factors in modules.items():
        stem = prefix + (name.replace(".", "_") if underscores else name)
        state[f"{stem}.{down}"] = factors.down.to(dtype).contiguous()
        state[f"{stem}.{up}"] = factors.up.to(dtype).contiguous()
        if factors.alpha is not None:
            state[f"{stem}.alpha"] = torch.tensor(factors.alpha)
    save_file(state, path, metadata)
    return path


def matrices(state: State) -> dict[str, tuple[int, int]]:
    """Return the shapes (o, i) of the layers whose weight is a matrix, by name."""
    found = {name.removesuffix(".weight"): value.shape for name, value in state.items() if name.endswith(".weight")}
    return {name: (shape[0], shape[1]) for name, shape in found.items() if len(shape) == 2}


def added(state: State, modules: Mapping[str, Factors], scale: float = 1.0) -> dict[str, Tensor]:
    """Return the state dict in fp64 with the changes of the modules added to their weights."""
    wide = {name: value.double() for name, value in state.items()}
    for name, factors in modules.items():
        wide[f"{name}.weight"] = wide[f"{name}.weight"] + scale * factors.delta
    return wide


def put_in(fusion: LoraFusion, path: Path, scale: float = 1.0) -> None:
    fusion.fuse([(open_lora(path, path.name, fusion.shapes()), scale)])


def state_of(fusion: LoraFusion, part: str = "transformer") -> dict[str, Tensor]:
    return {name: value.clone() for name, value in fusion.parts[part].state_dict().items()}


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.allclose(value.double(), expected[name].double(), rtol=tolerance, atol=tolerance), name
