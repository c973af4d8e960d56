"""The numbers that define a FLUX.1 model, read from its weights' shapes.

Field names are those of black-forest-labs/flux (802fb47); configuration files use the names of diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf
from typing import Any

# The axes of a token's position: kind of image, row, column.
_NUM_AXES = 3

Shapes = Mapping[str, Sequence[int]]
Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class FluxParams:
    """The transformer. `in_channels` counts the channels of a packed token: latent channels x 2 x 2."""

    in_channels: int
    out_channels: int
    vec_in_dim: int
    context_in_dim: int
    hidden_size: int
    mlp_hidden_dim: int
    num_heads: int
    depth: int
    depth_single_blocks: int
    axes_dim: tuple[int, ...]
    theta: int
    qkv_bias: bool
    guidance_embed: bool

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden size {self.hidden_size} is not a multiple of {self.num_heads} heads")
        has_all = len(self.axes_dim) == _NUM_AXES and all(dim > 0 and dim % 2 == 0 for dim in self.axes_dim)
        if not has_all or sum(self.axes_dim) != self.head_dim:
            raise ValueError(
                f"rotary axes {self.axes_dim} must be three even numbers above 0, "
                f"which add up to the head size {self.head_dim}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderParams:
    """The autoencoder. `channels` is the width of each level, finest first; each level but the last halves the side."""

    in_channels: int
    out_ch: int
    channels: tuple[int, ...]
    num_res_blocks: int
    z_channels: int
    num_groups: int
    scale_factor: float
    shift_factor: float

    def __post_init__(self) -> None:
        if any(width % self.num_groups for width in self.channels):
            raise ValueError(f"widths {self.channels} are not all multiples of {self.num_groups} norm groups")

    @property
    def downscale(self) -> int:
        """The number of pixels that a latent covers along one side."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleParams:
    """The noise schedule, shifted by the image size (dynamic) or by a constant `shift`.

    A `shift` of 1.0 changes nothing.
    """

    use_dynamic_shifting: bool
    shift: float = 1.0
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096

    def __post_init__(self) -> None:
        if self.use_dynamic_shifting and self.base_image_seq_len == self.max_image_seq_len:
            raise ValueError(f"base_image_seq_len and max_image_seq_len are both {self.max_image_seq_len}")


DEV = FluxParams(
    in_channels=64,
    out_channels=64,
    vec_in_dim=768,
    context_in_dim=4096,
    hidden_size=3072,
    mlp_hidden_dim=12288,
    num_heads=24,
    depth=19,
    depth_single_blocks=38,
    axes_dim=(16, 56, 56),
    theta=10_000,
    qkv_bias=True,
    guidance_embed=True,
)
SCHNELL = replace(DEV, guidance_embed=False)
AUTOENCODER = AutoencoderParams(
    in_channels=3,
    out_ch=3,
    channels=(128, 256, 512, 512),
    num_res_blocks=2,
    z_channels=16,
    num_groups=32,
    scale_factor=0.3611,
    shift_factor=0.1159,
)
_CHANNELS_PER_GROUP = AUTOENCODER.channels[0] // AUTOENCODER.num_groups
DEV_SCHEDULE = ScheduleParams(use_dynamic_shifting=True)
SCHNELL_SCHEDULE = ScheduleParams(use_dynamic_shifting=False)
# Settings of a scheduler that change images, each with the only value that is supported here.
# Source: diffusers 0.42.1, schedulers/scheduling_flow_match_euler_discrete.py.
_SCHEDULER_SETTINGS: Mapping[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "time_shift_type": "exponential",
    "shift_terminal": None,
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
# The T5 length that a model was trained with, by whether it embeds guidance: dev does, schnell does not.
# Source: black-forest-labs/flux 802fb47, src/flux/cli.py: 256 for schnell, else 512.
T5_SEQUENCE_LENGTH = {True: 512, False: 256}
# Rows of modulation to compute together, a row for each image and step. A row is multiplied with a quarter of all
# weights, and a GPU spends that time on reading the weights, so reading them once for many rows saves time.
MODULATION_ROWS = 64


def flux_params(shapes: Shapes, config: Config) -> FluxParams:
    """Read the transformer's parameters from shapes by original key name.

    `config`: a diffusers `transformer/config.json`, or empty; read only for numbers that the shapes do not determine.
    Raises: ValueError if a key is missing, or the rotary axes are unknown.
    """
    hidden_size, in_channels = shape_of(shapes, "img_in.weight")
    (head_dim,) = shape_of(shapes, "double_blocks.0.img_attn.norm.query_norm.scale", 1)
    axes_dim = config.get("axes_dims_rope") or (DEV.axes_dim if head_dim == DEV.head_dim else ())
    if not isinstance(axes_dim, (list, tuple)) or not all(type(dim) is int for dim in axes_dim):
        raise ValueError(f"axes_dims_rope in its config.json is {axes_dim!r}, should be a list of whole numbers")
    if not axes_dim:
        raise ValueError(
            f"the rotary axes of a transformer with head size {head_dim} cannot be derived from its weights: "
            "put a config.json with axes_dims_rope beside them"
        )
    if head_dim > hidden_size:
        raise ValueError(f"heads of size {head_dim} do not fit into a hidden size of {hidden_size}")
    return FluxParams(
        in_channels=in_channels,
        out_channels=shape_of(shapes, "final_layer.linear.weight")[0],
        vec_in_dim=shape_of(shapes, "vector_in.in_layer.weight")[1],
        context_in_dim=shape_of(shapes, "txt_in.weight")[1],
        hidden_size=hidden_size,
        mlp_hidden_dim=shape_of(shapes, "double_blocks.0.img_mlp.0.weight")[0],
        num_heads=hidden_size // head_dim,
        depth=count_of(shapes, "double_blocks."),
        depth_single_blocks=count_of(shapes, "single_blocks."),
        axes_dim=tuple(axes_dim),
        theta=DEV.theta,
        # One such bias is enough: if another is lost, the check reports that one as missing, not this one as unknown.
        qkv_bias=any(key.endswith("_attn.qkv.bias") for key in shapes),
        guidance_embed=any(key.startswith("guidance_in.") for key in shapes),
    )


def autoencoder_params(shapes: Shapes, config: Config) -> AutoencoderParams:
    """Read the autoencoder's parameters from shapes by original key name.

    `config`: a diffusers `vae/config.json`. If it is empty, scale, shift and the channels of a norm group at full size
    are those of FLUX.1. Raises: ValueError if a key is missing.
    """
    levels = range(count_of(shapes, "encoder.down."))
    channels = tuple(shape_of(shapes, f"encoder.down.{level}.block.0.conv1.weight", 4)[0] for level in levels)
    return AutoencoderParams(
        in_channels=shape_of(shapes, "encoder.conv_in.weight", 4)[1],
        out_ch=shape_of(shapes, "decoder.conv_out.weight", 4)[0],
        channels=channels,
        num_res_blocks=count_of(shapes, "encoder.down.0.block."),
        z_channels=shape_of(shapes, "decoder.conv_in.weight", 4)[1],
        num_groups=_read_count(config, "norm_num_groups", max(1, channels[0] // _CHANNELS_PER_GROUP)),
        scale_factor=_read_number(config, "scaling_factor", AUTOENCODER.scale_factor, above=0),
        shift_factor=_read_number(
            config, "shift_factor", 0.0 if "shift_factor" in config else AUTOENCODER.shift_factor
        ),
    )


def schedule_params(config: Config, *, guidance_embed: bool) -> ScheduleParams:
    """Read a diffusers `scheduler_config.json`; if empty, dev's schedule for embedded guidance, else schnell's.

    Raises: ValueError for a setting that changes images and is not supported here.
    """
    if not config:
        return DEV_SCHEDULE if guidance_embed else SCHNELL_SCHEDULE
    for name, value in _SCHEDULER_SETTINGS.items():
        if (config.get(name) or value) != value:
            raise ValueError(f"{name} in scheduler_config.json is {config[name]!r}: only {value!r} is known here")
    dynamic = bool(config.get("use_dynamic_shifting", False))
    default = DEV_SCHEDULE
    return ScheduleParams(
        use_dynamic_shifting=dynamic,
        shift=_read_number(config, "shift", default.shift, above=0),
        base_shift=_read_number(config, "base_shift", default.base_shift),
        max_shift=_read_number(config, "max_shift", default.max_shift),
        base_image_seq_len=_read_count(config, "base_image_seq_len", default.base_image_seq_len),
        max_image_seq_len=_read_count(config, "max_image_seq_len", default.max_image_seq_len),
    )


def _read_number(config: Config, name: str, default: float, *, above: float = -inf) -> float:
    """Return a number of a configuration, `default` if it is null or absent. Raises: ValueError for anything else."""
    value = config.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not above < value < inf:
        what = "a number" if above == -inf else f"a number above {above}"
        raise ValueError(f"{name} in its configuration is {value!r}, should be {what}")
    return value


def _read_count(config: Config, name: str, default: int) -> int:
    """Return a whole number from 1 on, like `_read_number`."""
    value = _read_number(config, name, default, above=0)
    if value != int(value):
        raise ValueError(f"{name} in its configuration is {value!r}, should be a whole number")
    return int(value)


def shape_of(shapes: Shapes, key: str, num_dims: int = 2) -> Sequence[int]:
    """Return the shape of `key`. Raises: ValueError if it is missing, or has another number of dimensions."""
    if key not in shapes:
        raise ValueError(f"{key} is missing")
    shape = shapes[key]
    if len(shape) != num_dims or 0 in shape:
        raise ValueError(f"{key} is {list(shape)}, should have {num_dims} dimensions, none of them 0")
    return shape


def count_of(shapes: Shapes, prefix: str) -> int:
    """Return the count of the numbers, from 0 on, that follow `prefix` in keys.

    Raises: ValueError with the first missing number: a checkpoint with a gap is incomplete, and a model with a block
    10^9 must not be built.
    """
    numbers = {key.removeprefix(prefix).split(".", 1)[0] for key in shapes if key.startswith(prefix)}
    count = sum(number.isdecimal() for number in numbers)
    missing = next((i for i in range(count) if str(i) not in numbers), None)
    if missing is not None:
        raise ValueError(f"{prefix}{missing} is missing")
    return count


def settings_of(config: Config, model_type: str, names: Sequence[str]) -> Config:
    """Return these settings of a config.json for the model type, without those that are null."""
    own = config if config.get("model_type") == model_type else {}
    return {name: own[name] for name in names if own.get(name) is not None}


def check_setting(name: str, value: object, is_right: bool, rule: str) -> None:
    """Raise ValueError with the rule that a setting breaks, unless `is_right`."""
    if not is_right:
        raise ValueError(f"its config.json does not fit its weights: {name} = {value!r} {rule}")


def first_step(num_steps: int, strength: float) -> int:
    """Return the step at which image-to-image starts. Source: diffusers 0.42.1, FluxImg2ImgPipeline."""
    return int(max(num_steps - min(num_steps * strength, num_steps), 0))


def steps_run(num_steps: int, strength: float, sigma_shift: float | None) -> int:
    """Return the number of steps that run. DiffSynth-Studio's static schedule runs all, whatever the strength."""
    return num_steps if sigma_shift is not None else num_steps - first_step(num_steps, strength)


def used_residuals(count: int, num_blocks: int, repeats: bool = False) -> int:
    """Return the number of a ControlNet's residuals that feed a block of its base.

    With 6 residuals for 19 blocks, the last one feeds no block.
    repeats: the blocks take the residuals in turn, as with XLabs' nets; else each feeds several consecutive blocks.
    """
    return min(count, num_blocks) if repeats or not count else ceil(num_blocks / ceil(num_blocks / count))


def counts_at(step: int, num_steps: int, start: float, end: float) -> bool:
    """Return whether a ControlNet is active at a step. Source: diffusers 0.42.1, FluxControlNetPipeline."""
    return not (step / num_steps < start or (step + 1) / num_steps > end)
