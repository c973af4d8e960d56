"""T5's encoder compared with golden numbers, and bit for bit with transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel

from flux_batch.model.checkpoint.checkpoint import open_checkpoint
from flux_batch.model.checkpoint.detect import detect
from flux_batch.model.text.t5 import T5Encoder, T5Model, T5Params, load_t5, t5_params
from helpers.golden import check, weight

CPU = torch.device("cpu")
T5 = T5Config(
    vocab_size=128,
    d_model=32,
    d_ff=64,
    d_kv=8,
    num_heads=4,
    num_layers=2,
    feed_forward_proj="gated-gelu",
    relative_attention_num_buckets=32,
    relative_attention_max_distance=128,
    tie_word_embeddings=False,
)
T5_IDS = torch.tensor([[5, 17, 99, 3, 42, 7, 1, *[0] * 33]])


def make_t5_file(folder: Path, config: T5Config, *names_of_table: str) -> Path:
    """Write golden weights, with the token table under the given names, and their config.json."""
    state = T5EncoderModel(config).state_dict()
    state = {name: weight(name, value.shape) for name, value in state.items() if "embed_tokens" not in name}
    table = state.pop("shared.weight")
    folder.mkdir()
    config.save_pretrained(folder)
    save_file({**state, **{name: table.clone() for name in names_of_table}}, folder / "model.safetensors")
    return folder


def load_t5_from(folder: Path, dtype: torch.dtype = torch.float32) -> T5Encoder:
    return load_t5(detect(open_checkpoint(folder))[1], dtype=dtype, device=CPU)


@pytest.mark.parametrize(
    "names",
    [("shared.weight",), ("encoder.embed_tokens.weight",), ("shared.weight", "encoder.embed_tokens.weight")],
    ids=["shared", "embed_tokens", "both"],
)
def test_t5_is_golden_by_whatever_name_its_table_goes(
    tokenizers: Path, names: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    t5 = load_t5_from(make_t5_file(tokenizers / request.node.callspec.id, T5, *names))
    first = [0.701578, 0.288141, 0.620550, -1.180667, -0.061144]
    check(t5.states(T5_IDS), -40.2515, 1053.5426, first, [1.696855, -0.549637, -1.099986])
    assert t5.width == 32


def test_t5_in_float16_keeps_its_wide_layer_in_float32(tokenizers: Path) -> None:
    t5 = load_t5_from(make_t5_file(tokenizers / "half", T5, "shared.weight"), torch.float16)
    dtypes = {name: value.dtype for name, value in t5.model.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
        f"encoder.block.{i}.layer.1.DenseReluDense.wo.weight" for i in range(2)
    }
    assert t5.states(T5_IDS).isfinite().all()


def keep_wide(model: torch.nn.Module) -> None:
    """Keep the layers in float32 that overflow in float16, as load_t5 and transformers do."""
    for name, module in model.named_modules():
        if name.endswith(".wo"):
            module.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({}, 1.0),
        ({"relative_attention_num_buckets": 16, "relative_attention_max_distance": 40}, 1.0),
        ({"layer_norm_epsilon": 0.1, "d_kv": 12}, 1.0),
        ({"feed_forward_proj": "gated-gelu_new", "dense_act_fn": "gelu_new"}, 1.0),
        ({}, 3e3),  # sums exceed the largest number of float16, in and after the attention
    ],
)
def test_it_computes_what_transformers_does(dtype: torch.dtype, settings: dict[str, float], size: float) -> None:
    config = T5Config(**T5.to_dict() | settings)
    theirs = T5EncoderModel(config).eval().to(dtype)
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            value.normal_(0, 1.0 if value.ndim == 1 else value.shape[-1] ** -0.5)
            if name.endswith(("o.weight", "wo.weight")):
                value.mul_(size)
    state = {name: value for name, value in theirs.state_dict().items() if "embed_tokens" not in name}
    ours = T5Model(t5_params({name: value.shape for name, value in state.items()}, config.to_dict())).to(dtype)
    ours.load_state_dict(state)
    if dtype == torch.float16:
        keep_wide(theirs)
        keep_wide(ours)
    with torch.inference_mode():
        for length in (1, 7, 300):
            ids = torch.arange(2 * length).view(2, length) % 128
            states = ours(ids)
            assert states.isfinite().all()
            assert torch.equal(states, theirs(ids).last_hidden_state)


def test_sizes_are_read_from_shapes() -> None:
    with torch.device("meta"):
        t5 = T5EncoderModel(T5)
    params = t5_params({name: value.shape for name, value in t5.state_dict().items()}, {})
    assert params == T5Params(vocab_size=128, d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=2)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("relative_attention_max_distance", 8, "must be greater than 8"),
        ("relative_attention_max_distance", "far", "must be greater than 8"),
        ("layer_norm_epsilon", -1, "must be greater than 0"),
        ("feed_forward_proj", "relu", "must be gated-gelu"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(name: str, value: object, rule: str) -> None:
    shapes = {key: tensor.shape for key, tensor in T5EncoderModel(T5).state_dict().items()}
    config = T5.to_dict() | {name: value}
    with pytest.raises(ValueError, match=r"its config\.json does not fit its weights: ") as caught:
        t5_params(shapes, config)
    assert str(caught.value).endswith(f"{name} = {value!r} {rule}")
