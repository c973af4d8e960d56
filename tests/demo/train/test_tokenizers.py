from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, CLIPTokenizer, T5TokenizerFast

from flux_batch.demo.train.tokenizers import write_clip_tokenizer, write_t5_tokenizer
from flux_batch.demo.world.captions import captions

TEXTS = [caption.text for caption in captions(4000, seed=0)]
UNSEEN = [caption.text for caption in captions(200, seed=7, held_out=True)]
LONG = "a small red star " * 150


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_clip_tokenizer(folder, TEXTS)
    return folder


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer_2")
    write_t5_tokenizer(folder, TEXTS)
    return folder


@pytest.fixture(scope="module")
def clip(clip_folder: Path) -> Any:
    return CLIPTokenizer.from_pretrained(clip_folder)


@pytest.fixture(scope="module")
def t5(t5_folder: Path) -> Any:
    return T5TokenizerFast.from_pretrained(t5_folder)


def test_folders_hold_the_files_of_a_real_repository(clip_folder: Path, t5_folder: Path) -> None:
    configs = {"special_tokens_map.json", "tokenizer_config.json"}
    assert {path.name for path in clip_folder.iterdir()} == {"merges.txt", "vocab.json", *configs}
    assert {path.name for path in t5_folder.iterdir()} == {"spiece.model", "tokenizer.json", *configs}


def test_training_twice_gives_the_same_bytes(clip_folder: Path, t5_folder: Path, tmp_path: Path) -> None:
    for name in ("clip", "t5"):
        (tmp_path / name).mkdir()
    write_clip_tokenizer(tmp_path / "clip", TEXTS)
    write_t5_tokenizer(tmp_path / "t5", TEXTS)

    assert bytes_of(tmp_path / "clip") == bytes_of(clip_folder)
    assert bytes_of(tmp_path / "t5") == bytes_of(t5_folder)


def test_special_tokens_have_their_places(clip: Any, t5: Any) -> None:
    # CLIP's end of text must be the largest id: the text encoder looks for the largest.
    assert clip.eos_token_id == clip.pad_token_id == clip.unk_token_id == len(clip) - 1
    assert clip.bos_token_id == len(clip) - 2
    assert (t5.pad_token_id, t5.eos_token_id, t5.unk_token_id) == (0, 1, 2)
    assert t5.convert_tokens_to_ids("<extra_id_0>") == len(t5) - 1
    assert (clip.model_max_length, t5.model_max_length) == (77, 512)


def test_auto_tokenizer_reads_both(clip_folder: Path, t5_folder: Path, clip: Any, t5: Any) -> None:
    for folder, tokenizer in ((clip_folder, clip), (t5_folder, t5)):
        assert AutoTokenizer.from_pretrained(folder)(UNSEEN[:20]).input_ids == tokenizer(UNSEEN[:20]).input_ids


@pytest.mark.parametrize("caption", UNSEEN[::10])
def test_captions_survive_the_round_trip(clip: Any, t5: Any, caption: str) -> None:
    spaced = caption.replace(",", " ,").replace("-", " - ")  # CLIP's decoder puts a space between words
    assert clip.decode(clip(caption).input_ids, skip_special_tokens=True) == spaced
    assert t5.decode(t5(caption).input_ids, skip_special_tokens=True) == caption


def test_captions_fit_and_take_about_a_token_a_word(clip: Any, t5: Any) -> None:
    for tokenizer in (clip, t5):
        lengths = [len(ids) for ids in tokenizer(UNSEEN).input_ids]
        assert max(lengths) <= tokenizer.model_max_length
        assert sum(lengths) < 2 * sum(len(text.split()) for text in UNSEEN)


def test_clip_reads_no_case(clip: Any) -> None:
    assert clip("A Red STAR").input_ids == clip("a red star").input_ids


def test_t5_reads_as_sentencepiece_does(t5: Any, t5_folder: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(t5_folder / "spiece.model"))
    for text in [*UNSEEN, "An astronaut, 30% larger!", "  double  spaces ", ""]:
        assert t5(text).input_ids == [*processor.encode(text), 1]


@settings(deadline=None)
@given(text=st.text())
def test_any_text_is_tokenized(clip: Any, t5: Any, text: str) -> None:
    for tokenizer in (clip, t5):
        ids = tokenizer(text, padding="max_length", truncation=True).input_ids
        assert len(ids) == tokenizer.model_max_length
        assert min(ids) >= 0
        assert max(ids) < len(tokenizer)
        assert tokenizer.eos_token_id in ids


def test_long_prompts_are_cut_and_still_end(clip: Any, t5: Any) -> None:
    for tokenizer in (clip, t5):
        ids = tokenizer(LONG, truncation=True).input_ids
        assert len(ids) == tokenizer.model_max_length
        assert ids[-1] == tokenizer.eos_token_id


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
