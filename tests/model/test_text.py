"""The text encoders against golden numbers, and the published tokenizers where a copy lies beside the repository."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from flux_batch.model.checkpoint.checkpoint import open_checkpoint
from flux_batch.model.checkpoint.detect import detect
from flux_batch.model.text import (
    ClipEncoder,
    T5Encoder,
    clip_settings,
    count_tokens,
    load_clip,
    load_t5,
    load_tokenizer,
    t5_settings,
    tokenize,
)
from helpers.golden import check, weight
from helpers.tiny_flux import TinyFlux, make_tiny_pipeline

CPU = torch.device("cpu")
TOKENIZERS = Path(__file__).parents[3] / "shared" / "tokenizers"
PROMPTS = {
    "": ([49406, 49407], [1]),
    "A cat holding a sign that says hello world": (
        [49406, 320, 2368, 5050, 320, 2292, 682, 1563, 3306, 1002, 49407],
        [71, 1712, 3609, 3, 9, 1320, 24, 845, 21820, 296, 1],
    ),
    "a photo of an astronaut": ([49406, 320, 1125, 539, 550, 18376, 49407], [3, 9, 1202, 13, 46, 30059, 1]),
    "HELLO World": ([49406, 3306, 1002, 49407], [454, 12735, 667, 1150, 1]),
    "  double  spaces\nnewline  ": ([49406, 3200, 9006, 1218, 1148, 49407], [1486, 4856, 126, 747, 1]),
    "<extra_id_0> A1B2, don't!": (
        [49406, 283, 4231, 318, 1014, 318, 271, 285, 320, 272, 321, 273, 267, 847, 713, 256, 49407],
        [32099, 71, 536, 279, 4482, 278, 31, 17, 55, 1],
    ),
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tokenizers of the tiny model."""
    folder = tmp_path_factory.mktemp("tokenizers")
    pipeline = make_tiny_pipeline(TinyFlux())
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    pipeline.tokenizer_2.save_pretrained(folder / "tokenizer_2")
    return folder


def make_clip_file(folder: Path, config: CLIPTextConfig) -> Path:
    """Write golden weights under the key names of the published file, and their config.json."""
    names = CLIPTextModel(config).state_dict()
    state = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in names.items()}
    folder.mkdir()
    config.save_pretrained(folder)
    save_file({name: weight(name, value.shape) for name, value in state.items()}, folder / "model.safetensors")
    return folder


def make_t5_file(folder: Path, config: T5Config, *names_of_table: str) -> Path:
    """Write golden weights, the token table under the names given, and their config.json."""
    state = T5EncoderModel(config).state_dict()
    state = {name: weight(name, value.shape) for name, value in state.items() if "embed_tokens" not in name}
    table = state.pop("shared.weight")
    folder.mkdir()
    config.save_pretrained(folder)
    save_file({**state, **{name: table.clone() for name in names_of_table}}, folder / "model.safetensors")
    return folder


def load_clip_from(folder: Path) -> ClipEncoder:
    return load_clip(detect(open_checkpoint(folder))[1], dtype=torch.float32, device=CPU)


def load_t5_from(folder: Path, dtype: torch.dtype = torch.float32) -> T5Encoder:
    return load_t5(detect(open_checkpoint(folder))[1], dtype=dtype, device=CPU)


CLIP = CLIPTextConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=4,
    num_hidden_layers=2,
    max_position_embeddings=16,
    hidden_act="quick_gelu",
    bos_token_id=0,
    eos_token_id=2,
    pad_token_id=1,
)
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


def test_clip_is_golden(tokenizers: Path) -> None:
    clip = load_clip_from(make_clip_file(tokenizers / "clip", CLIP))
    pooled = clip.pool(torch.tensor([[126, 5, 17, 99, 3, 127, *[127] * 10]]))
    first = [-0.096738, 1.349663, -1.884292, 1.647430, -0.233179]
    check(pooled, 0.588754, 24.943624, first, [-0.073559, -1.041335, -0.175327])
    assert clip.width == 32
    assert clip.max_length == 16


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


def test_sizes_of_text_encoders_are_read_from_shapes() -> None:
    with torch.device("meta"):
        clip = CLIPTextModel(CLIPTextConfig())
        t5 = T5EncoderModel(T5)
    shapes = {name.removeprefix("text_model."): value.shape for name, value in clip.state_dict().items()}
    config = CLIPTextConfig(**clip_settings(shapes, {}))
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (512, 2048, 12)
    assert (config.vocab_size, config.max_position_embeddings) == (49408, 77)
    config = T5Config(**t5_settings({name: value.shape for name, value in t5.state_dict().items()}, {}))
    for name in ("vocab_size", "d_model", "d_ff", "d_kv", "num_heads", "num_layers", "is_gated_act", "dense_act_fn"):
        assert getattr(config, name) == getattr(T5, name)


def test_a_setting_that_is_null_is_as_if_left_out() -> None:
    with torch.device("meta"):
        clip = CLIPTextModel(CLIPTextConfig())
    shapes = {name.removeprefix("text_model."): value.shape for name, value in clip.state_dict().items()}
    told = {"model_type": "clip_text_model", "eos_token_id": None, "hidden_act": "gelu"}
    assert clip_settings(shapes, told) == clip_settings(shapes, {}) | {"hidden_act": "gelu"}


def test_a_prompt_at_the_border_is_not_truncated(tokenizers: Path) -> None:
    clip = ClipEncoder(load_tokenizer(CLIPTokenizer, tokenizers, "tokenizer"), CLIPTextModel(CLIP))
    assert clip.truncated(["a" * 14, "a" * 15, ""]) == [False, True, False]
    t5 = T5Encoder(load_tokenizer(T5Tokenizer, tokenizers, "tokenizer_2"), None)
    # The space SentencePiece puts in front is a token of the tiny model.
    assert t5.truncated(["a" * 6, "a" * 7], 8) == [False, True]
    assert t5.truncated(["a" * 600], 512) == [True]


def test_prompts_are_padded_to_the_length_asked_for(tokenizers: Path) -> None:
    tokenizer = load_tokenizer(T5Tokenizer, tokenizers, "tokenizer_2")
    ids = tokenize(tokenizer, ["ab", "a" * 50], 8)
    assert ids.shape == (2, 8)
    assert ids[0, 4:].tolist() == [0] * 4
    assert ids[1, -1] == 1
    assert tokenize(tokenizer, ["ab"], 600).shape == (1, 600)


def test_a_missing_tokenizer_names_both_places(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer: neither .*home.tokenizer_2 nor .*tokenizer_2 is there"):
        load_tokenizer(T5Tokenizer, tmp_path / "home", "tokenizer_2")


def test_an_empty_tokenizer_folder_is_refused(tmp_path: Path) -> None:
    for kind, name in ((CLIPTokenizer, "tokenizer"), (T5Tokenizer, "tokenizer_2")):
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=name):
            load_tokenizer(kind, tmp_path, name)


@pytest.mark.parametrize("most", ["", 0, -1, None, float("nan"), [512]])
def test_a_tokenizer_without_a_length_is_refused(tokenizers: Path, tmp_path: Path, most: object) -> None:
    shutil.copytree(tokenizers / "tokenizer_2", tmp_path / "tokenizer_2")
    path = tmp_path / "tokenizer_2" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": most}))
    if most is None:  # as a file without this line, which says that any length will do
        assert load_tokenizer(T5Tokenizer, tmp_path, "tokenizer_2").model_max_length > 10**9
        return
    with pytest.raises(ValueError, match=r"tokenizer_2 holds a tokenizer that cannot be used: model_max_length = "):
        load_tokenizer(T5Tokenizer, tmp_path, "tokenizer_2")


@pytest.mark.skipif(not TOKENIZERS.is_dir(), reason="no copy of the published tokenizers beside the repository")
@pytest.mark.parametrize("prompt", PROMPTS)
def test_published_tokenizers_give_the_ids_of_the_references(prompt: str) -> None:
    clip_ids, t5_ids = PROMPTS[prompt]
    clip = load_tokenizer(CLIPTokenizer, TOKENIZERS, "tokenizer")
    assert tokenize(clip, [prompt], 77)[0].tolist() == clip_ids + [49407] * (77 - len(clip_ids))
    t5 = load_tokenizer(T5Tokenizer, TOKENIZERS, "tokenizer_2")
    assert tokenize(t5, [prompt], 512)[0].tolist() == t5_ids + [0] * (512 - len(t5_ids))


@pytest.mark.skipif(not TOKENIZERS.is_dir(), reason="no copy of the published tokenizers beside the repository")
def test_the_border_of_what_the_published_tokenizers_read() -> None:
    """CLIP adds two tokens of its own, T5 one."""
    clip = ClipEncoder(
        load_tokenizer(CLIPTokenizer, TOKENIZERS, "tokenizer"),
        CLIPTextModel(CLIPTextConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)),
    )
    assert clip.max_length == 77
    assert count_tokens(clip.tokenizer, ["cat " * 75, "cat " * 76]) == [77, 78]
    assert clip.truncated(["cat " * 75, "cat " * 76, "", "cat, " * 38]) == [False, True, False, True]
    t5 = T5Encoder(load_tokenizer(T5Tokenizer, TOKENIZERS, "tokenizer_2"), None)
    assert t5.max_length == 512
    assert count_tokens(t5.tokenizer, ["the " * 511, "the " * 512]) == [512, 513]
    assert t5.truncated(["the " * 511, "the " * 512, ""], 512) == [False, True, False]
    assert t5.truncated(["the " * 255, "the " * 256], 256) == [False, True]
    # What is cut is the end of the prompt, never the end-of-text token.
    cut = tokenize(t5.tokenizer, ["the " * 600], 512)[0]
    assert (cut[-1], cut[-2]) == (1, 8)
    cut = tokenize(clip.tokenizer, ["cat " * 600], 77)[0]
    assert (cut[0], cut[-1], cut[-2]) == (49406, 49407, 2368)
