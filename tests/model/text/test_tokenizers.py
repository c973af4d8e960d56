"""The tokenizers, and the published ones if a copy is beside the repository."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Barrier, BrokenBarrierError, Thread
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import CLIPTokenizer, T5Tokenizer

from flux_batch.model.text.clip import ClipEncoder, ClipModel, ClipParams
from flux_batch.model.text.t5 import T5Encoder, T5Model, T5Params
from flux_batch.model.text.tokenizers import count_tokens, left_out, load_tokenizer, tokenize

TOKENIZERS = Path(__file__).parents[4] / "shared" / "tokenizers"
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


def small_clip(max_length: int) -> ClipModel:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return ClipModel(ClipParams(vocab_size=8, max_position_embeddings=max_length, **sizes))


def small_t5() -> T5Model:
    return T5Model(T5Params(vocab_size=8, d_model=8, d_kv=8, d_ff=8, num_layers=1, num_heads=1))


def test_a_prompt_at_the_border_is_not_truncated(tokenizers: Path) -> None:
    clip = ClipEncoder(load_tokenizer(CLIPTokenizer, tokenizers, "tokenizer"), small_clip(16))
    assert clip.truncated(["a" * 14, "a" * 15, ""]) == [False, True, False]
    t5 = T5Encoder(load_tokenizer(T5Tokenizer, tokenizers, "tokenizer_2"), small_t5())
    # The space that SentencePiece puts in front is a token of the tiny model.
    assert t5.truncated(["a" * 6, "a" * 7], 8) == [False, True]
    assert t5.truncated(["a" * 600], 512) == [True]


def test_prompts_are_padded_to_the_length_asked_for(tokenizers: Path) -> None:
    tokenizer = load_tokenizer(T5Tokenizer, tokenizers, "tokenizer_2")
    ids = tokenize(tokenizer, ["ab", "a" * 50], 8)
    assert [len(each) for each in ids] == [8, 8]
    assert ids[0][4:] == [0] * 4
    assert ids[1][-1] == 1
    assert [len(each) for each in tokenize(tokenizer, ["ab"], 600)] == [600]


@pytest.mark.parametrize("use", [lambda it: tokenize(it, ["a"], 8), lambda it: left_out(it, "a", 8)])
def test_threads_take_turns_at_a_tokenizer(use: Callable[[Any], object]) -> None:
    """A tokenizer stores its truncation and padding, which a count in another thread could change."""
    both = Barrier(2, timeout=0.2)
    met = []

    def tokenizer(texts: Any, **how: Any) -> Any:
        try:
            both.wait()
            met.append(texts)
        except BrokenBarrierError:
            pass
        return SimpleNamespace(input_ids=[[1]])

    threads = [Thread(target=use, args=(tokenizer,)), Thread(target=count_tokens, args=(tokenizer, ["b"]))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not met


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
    if most is None:  # a file without this line allows any length
        assert load_tokenizer(T5Tokenizer, tmp_path, "tokenizer_2").model_max_length > 10**9
        return
    with pytest.raises(ValueError, match=r"tokenizer_2 holds a tokenizer that cannot be used: model_max_length = "):
        load_tokenizer(T5Tokenizer, tmp_path, "tokenizer_2")


@pytest.mark.skipif(not TOKENIZERS.is_dir(), reason="no copy of the published tokenizers beside the repository")
@pytest.mark.parametrize("prompt", PROMPTS)
def test_published_tokenizers_give_the_ids_of_the_references(prompt: str) -> None:
    clip_ids, t5_ids = PROMPTS[prompt]
    clip = load_tokenizer(CLIPTokenizer, TOKENIZERS, "tokenizer")
    assert tokenize(clip, [prompt], 77)[0] == clip_ids + [49407] * (77 - len(clip_ids))
    t5 = load_tokenizer(T5Tokenizer, TOKENIZERS, "tokenizer_2")
    assert tokenize(t5, [prompt], 512)[0] == t5_ids + [0] * (512 - len(t5_ids))


@pytest.mark.skipif(not TOKENIZERS.is_dir(), reason="no copy of the published tokenizers beside the repository")
def test_the_border_of_what_the_published_tokenizers_read() -> None:
    """CLIP adds two special tokens, T5 adds one."""
    clip = ClipEncoder(
        load_tokenizer(CLIPTokenizer, TOKENIZERS, "tokenizer"),
        small_clip(77),
    )
    assert clip.max_length == 77
    assert count_tokens(clip.tokenizer, ["cat " * 75, "cat " * 76]) == [77, 78]
    assert clip.truncated(["cat " * 75, "cat " * 76, "", "cat, " * 38]) == [False, True, False, True]
    t5 = T5Encoder(load_tokenizer(T5Tokenizer, TOKENIZERS, "tokenizer_2"), small_t5())
    assert t5.max_length == 512
    assert count_tokens(t5.tokenizer, ["the " * 511, "the " * 512]) == [512, 513]
    assert t5.truncated(["the " * 511, "the " * 512, ""], 512) == [False, True, False]
    assert t5.truncated(["the " * 255, "the " * 256], 256) == [False, True]
    # Truncation removes the end of the prompt, never the end-of-text token.
    cut = tokenize(t5.tokenizer, ["the " * 600], 512)[0]
    assert (cut[-1], cut[-2]) == (1, 8)
    cut = tokenize(clip.tokenizer, ["cat " * 600], 77)[0]
    assert (cut[0], cut[-1], cut[-2]) == (49406, 49407, 2368)
