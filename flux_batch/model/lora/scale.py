"""The factor alpha / rank of the modules of a LoRA.

The module's tensor `alpha` takes precedence over PEFT's configuration, which diffusers writes into the metadata of the
file and PEFT into a file beside it. Without either, alpha equals the rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from flux_batch.model.checkpoint.checkpoint import Checkpoint, read_json
from flux_batch.model.lora.keys import PEFT_WRAPPER

# Source: diffusers 0.42.1, loaders/lora_base.py; the settings of a part begin with `<part>.`.
_DIFFUSERS_METADATA = "lora_adapter_metadata"
# Source: peft 0.21, utils/constants.py.
PEFT_WEIGHTS, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Inits that change the model before training: the file is a difference to the changed model.
# Source: peft 0.21, tuners/lora/config.py, `init_lora_weights`; as it says, such a file can be converted.
_INITS_THAT_CHANGE_THE_MODEL = ("pissa", "olora", "corda", "loftq", "lora_ga")
# PEFT's patterns are regular expressions from an untrusted file: nested repeats can take years to match.
_REPEATED_GROUP, _MAX_REPEATS = re.compile(r"\)[*+?{]|\\[1-9]|\(\?[^:]"), 3


class Scales:
    """The alphas of the modules of a LoRA file. Raises: ValueError for settings that cannot be read."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._source = checkpoint.source
        self._settings = _read_settings(checkpoint)
        for settings in self._settings.values():
            _check_init(checkpoint.source, settings.get("init_lora_weights"))
        # After training with split_qkv, sd-scripts writes the pieces of a layer as one block-diagonal module. Its rank
        # is the sum of their ranks, but its alpha is that of one piece, so alpha / rank must be multiplied by the
        # number of pieces (kohya-ss/sd-scripts #2204; 450630c, networks/lora_flux.py, state_dict).
        arguments = _read_metadata(checkpoint, "ss_network_args")
        self.is_of_split_layers = str(arguments.get("split_qkv")).lower() == "true"

    def alpha_over_rank(self, stem: str, rank: int, alpha: float | None) -> float:
        """Return the factor of a module's product; `alpha`: the value of its tensor, None without one."""
        settings, name = self._settings_of(stem)
        if alpha is None:
            alpha = self._stated(settings, name, "alpha", ("lora_alpha", "alpha"))
        if alpha is None:
            return 1.0
        if not math.isfinite(alpha):
            raise ValueError(f"{self._source}: the alpha of {stem} is {alpha}, should be a number")
        return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)

    def stated_alpha_over_rank(self, stem: str) -> float:
        """Return the factor from PEFT's settings, for a module whose tensors lack the rank."""
        settings, name = self._settings_of(stem)
        rank = self._stated(settings, name, "rank", ("r",))
        if rank is None:
            return 1.0
        if not 1 <= rank < math.inf:
            raise ValueError(f"{self._source}: the rank of {stem} is {rank} in its settings, should be 1 or more")
        return self.alpha_over_rank(stem, int(rank), None)

    def _settings_of(self, stem: str) -> tuple[Mapping[str, Any], str]:
        """Return the settings for a module, and the module's name in these settings."""
        name = stem.removeprefix(PEFT_WRAPPER)
        part, _, rest = name.partition(".")
        return (self._settings[part], rest) if part in self._settings else (self._settings.get("", {}), name)

    def _stated(self, settings: Mapping[str, Any], name: str, what: str, keys: tuple[str, ...]) -> float | None:
        """Return the alpha or rank of a module in PEFT's settings: by its name, else the default."""
        patterns = settings.get(f"{what}_pattern") or {}
        if not isinstance(patterns, Mapping):
            raise ValueError(f"{self._source}: {what}_pattern in its settings is not a mapping")
        of_all = next((settings[key] for key in keys if key in settings), None)
        number = next((value for pattern, value in patterns.items() if self._fits(pattern, name)), of_all)
        if number is None or (isinstance(number, (int, float)) and not isinstance(number, bool)):
            return number
        raise ValueError(f"{self._source}: the {what} of {name} is {number!r} in its settings, should be a number")

    def _fits(self, pattern: str, name: str) -> bool:
        """Return whether a pattern of PEFT matches a module. Source: peft 0.21, utils/other.py, get_pattern_key."""
        if _REPEATED_GROUP.search(pattern) or len(re.findall(r"[*+?{]", pattern)) > _MAX_REPEATS:
            raise ValueError(f"{self._source}: the pattern {pattern!r} in its settings is too complex to be supported")
        try:
            return re.match(rf"(.*\.)?({pattern})$", name) is not None
        except re.error as error:
            raise ValueError(f"{self._source}: the pattern {pattern!r} in its settings is wrong: {error}") from error


def _read_settings(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Read PEFT's settings, by the first word of the stems that they apply to; "" applies to all."""
    beside = checkpoint.folder / _PEFT_CONFIG
    is_of_peft = any(tensor.path.name == PEFT_WEIGHTS for tensor in checkpoint.tensors.values())
    if is_of_peft and beside.is_file():
        return {"": read_json(beside)}
    settings: dict[str, dict[str, Any]] = {}
    for key, value in _read_metadata(checkpoint, _DIFFUSERS_METADATA).items():
        part, _, name = key.partition(".")
        settings.setdefault(part, {})[name] = value
    return settings


def _check_init(source: str, start: object) -> None:
    """Raise ValueError for an init that changes the model before training."""
    if isinstance(start, str) and start.lower().startswith(_INITS_THAT_CHANGE_THE_MODEL):
        what = f"its training began with {start}, which changes the model, too; have PEFT convert it when it is saved"
        raise ValueError(f"{source} is a LoRA that is not supported: {what} (path_initial_model_for_weight_conversion)")


def _read_metadata(checkpoint: Checkpoint, key: str) -> dict[str, Any]:
    """Read a JSON object from the header; {} if it is absent, empty or "None"."""
    text = next((header[key] for header in checkpoint.headers if header.get(key) not in (None, "", "None")), "{}")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{checkpoint.source}: {key} in its metadata is not valid JSON: {error}") from error
    return value if isinstance(value, dict) else {}
