"""alpha / rank of a LoRA's modules: what the file says of it, where it says it; knows no tensor.

A tensor `alpha` of the module goes first, then PEFT's configuration, which diffusers writes into the file's metadata
and PEFT itself into a file beside it; without either, alpha is the rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from flux_batch.model.checkpoint import Checkpoint, read_json
from flux_batch.model.lora_keys import PEFT_WRAPPER

# Source: diffusers 0.42.1, loaders/lora_base.py; a part's settings, each under `<part>.`.
DIFFUSERS_METADATA = "lora_adapter_metadata"
# Source: peft 0.21, utils/constants.py.
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Scales:
    """What a LoRA file says of the alphas of its modules. Raises: ValueError if that cannot be read."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._source = checkpoint.source
        self._settings = read_settings(checkpoint)
        # Trained with split_qkv, sd-scripts writes the pieces of a layer as one block-diagonal module, with their ranks
        # added up and the alpha of one: alpha / rank is then too small by the number of pieces (kohya-ss/sd-scripts
        # #2204; 450630c, networks/lora_flux.py, state_dict).
        arguments = read_metadata(checkpoint, "ss_network_args")
        self.is_of_split_layers = str(arguments.get("split_qkv")).lower() == "true"

    def alpha_over_rank(self, stem: str, rank: int, alpha: float | None) -> float:
        """Return what a module's product is multiplied by; `alpha`: that of its own tensor."""
        settings = self._settings_of(stem)
        if alpha is None:
            alpha = self._stated(settings, stem)
        if alpha is None:
            return 1.0
        if not math.isfinite(alpha):
            raise ValueError(f"{self._source}: the alpha of {stem} is {alpha}, should be a number")
        return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)

    def _settings_of(self, stem: str) -> Mapping[str, Any]:
        return self._settings.get(stem.partition(".")[0], self._settings.get("", {}))

    def _stated(self, settings: Mapping[str, Any], stem: str) -> float | None:
        """Return the alpha that PEFT's settings give a module: by name, else the one for all."""
        name = f".{stem.removeprefix(PEFT_WRAPPER)}"
        patterns = settings.get("alpha_pattern") or {}
        if not isinstance(patterns, Mapping):
            raise ValueError(f"{self._source}: alpha_pattern in its settings is no mapping")
        for pattern in patterns:
            if re.search(r"[][\\*+?^$|(){}]", pattern):
                raise ValueError(f"{self._source}: alpha_pattern {pattern!r} is an expression, which is not supported")
        found = next((value for pattern, value in patterns.items() if name.endswith(f".{pattern}")), None)
        alpha = settings.get("lora_alpha", settings.get("alpha")) if found is None else found
        if alpha is None or (isinstance(alpha, (int, float)) and not isinstance(alpha, bool)):
            return alpha
        raise ValueError(f"{self._source}: the alpha of {stem} is {alpha!r} in its settings, should be a number")


def read_settings(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Return PEFT's settings by the first word of the stems they are for; "" is for all."""
    beside = checkpoint.home / PEFT_CONFIG
    is_of_peft = any(tensor.path.name == PEFT_WEIGHTS for tensor in checkpoint.tensors.values())
    if is_of_peft and beside.is_file():
        return {"": read_json(beside)}
    settings: dict[str, dict[str, Any]] = {}
    for key, value in read_metadata(checkpoint, DIFFUSERS_METADATA).items():
        part, _, name = key.partition(".")
        settings.setdefault(part, {})[name] = value
    return settings


def read_metadata(checkpoint: Checkpoint, key: str) -> dict[str, Any]:
    """Return a JSON object that stands in the header; {} if there is none."""
    try:
        value = json.loads(checkpoint.metadata.get(key) or "{}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{checkpoint.source}: {key} in its metadata is not valid JSON: {error}") from error
    return value if isinstance(value, dict) else {}
