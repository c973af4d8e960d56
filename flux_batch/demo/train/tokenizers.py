"""The two tokenizers of the demo model, trained on its captions.

Files, special tokens and their ids follow FLUX.1, so that programs for the real files can read these. Every text can be
tokenized: CLIP's tokenizer falls back to bytes, T5's to `<unk>`.
"""

from __future__ import annotations

import io
import json
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CLIP_LENGTH = 77
_T5_LENGTH = 512
_CLIP_START, _CLIP_END = "<|startoftext|>", "<|endoftext|>"
_T5_PAD, _T5_END, _T5_UNKNOWN = "<pad>", "</s>", "<unk>"
_WORD_END = "</w>"
# More than the captions need: training stops early when each of their words is one token.
_CLIP_MAX_MERGES = 1000
_T5_PIECES = 300
# As many as in T5, for the same ids, although this model was not trained to fill gaps.
_NUM_EXTRA_IDS = 100


def write_clip_tokenizer(folder: Path, texts: Iterable[str]) -> int:
    """Train CLIP's byte-level tokenizer and write its four files. Returns: the size of its vocabulary."""
    merges = _train_merges(texts)
    letters = _byte_letters()
    tokens = [
        *letters,
        *(letter + _WORD_END for letter in letters),
        *("".join(pair) for pair in merges),
        _CLIP_START,
        # The end token must have the largest id, by which the text encoder finds the end of a text.
        _CLIP_END,
    ]
    write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)})
    _write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""]))
    start, end = _special_token(_CLIP_START, normalized=True), _special_token(_CLIP_END)
    write_json(
        folder / "special_tokens_map.json",
        {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end},
    )
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(len(tokens) - 2): {**start, "special": True},
                str(len(tokens) - 1): {**end, "special": True},
            },
            "bos_token": _CLIP_START,
            "clean_up_tokenization_spaces": False,
            "do_lower_case": True,
            "eos_token": _CLIP_END,
            "errors": "replace",
            "model_max_length": CLIP_LENGTH,
            "pad_token": _CLIP_END,
            "tokenizer_class": "CLIPTokenizer",
            "unk_token": _CLIP_END,
        },
    )
    return len(tokens)


def _train_merges(texts: Iterable[str]) -> list[tuple[str, str]]:
    """Return the pairs to merge in lower-case English texts, most frequent first."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=_WORD_END))
    words = pre_tokenizers.Whitespace()  # splits such texts as CLIP's own pattern does
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(_byte_letters()) + _CLIP_MAX_MERGES,
        min_frequency=2,
        end_of_word_suffix=_WORD_END,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return [(first, second) for first, second in json.loads(tokenizer.to_str())["model"]["merges"]]


def _byte_letters() -> list[str]:
    """Return the letters that stand for the 256 bytes, in the order of CLIP's vocabulary."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def write_t5_tokenizer(folder: Path, texts: Iterable[str]) -> int:
    """Train T5's SentencePiece model and write its four files. Returns: the size of its vocabulary."""
    model = _train_sentencepiece(texts)
    extra_ids = [f"<extra_id_{number}>" for number in range(_NUM_EXTRA_IDS)]
    # The extra ids come after the pieces in reverse order: <extra_id_0> has the largest id.
    vocabulary = [*_pieces_of(model), *((name, 0.0) for name in reversed(extra_ids))]
    ids = {piece: index for index, (piece, _) in enumerate(vocabulary)}
    special = [_T5_PAD, _T5_END, _T5_UNKNOWN, *reversed(extra_ids)]
    (folder / "spiece.model").write_bytes(model)
    _write_text(folder / "tokenizer.json", _fast_tokenizer(vocabulary, special))
    names = {"eos_token": _T5_END, "pad_token": _T5_PAD, "unk_token": _T5_UNKNOWN}
    write_json(
        folder / "special_tokens_map.json",
        {
            "additional_special_tokens": extra_ids,
            **{role: _special_token(name) for role, name in names.items()},
        },
    )
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": True,
            "added_tokens_decoder": {str(ids[name]): {**_special_token(name), "special": True} for name in special},
            "additional_special_tokens": extra_ids,
            "clean_up_tokenization_spaces": True,
            "eos_token": _T5_END,
            "extra_ids": _NUM_EXTRA_IDS,
            "legacy": True,
            "model_max_length": _T5_LENGTH,
            "pad_token": _T5_PAD,
            "sp_model_kwargs": {},
            "tokenizer_class": "T5Tokenizer",
            "unk_token": _T5_UNKNOWN,
        },
    )
    return len(vocabulary)


def _train_sentencepiece(texts: Iterable[str]) -> bytes:
    """Return a unigram model in SentencePiece's own format."""
    import sentencepiece

    texts = list(texts)
    words = sorted({word.strip(string.punctuation) for text in texts for word in text.split()})
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        # The trainer only considers pieces that occur in two words: each word comes with and without a dot.
        sentence_iterator=iter([*texts, *(f"{word}." for word in words)]),
        model_writer=model,
        model_type="unigram",
        vocab_size=_T5_PIECES,
        hard_vocab_limit=False,
        # No normalisation: its Unicode tables would be twenty times as large as the rest of the file.
        normalization_rule_name="identity",
        required_chars=string.ascii_letters + string.digits + string.punctuation,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece=_T5_PAD,
        eos_piece=_T5_END,
        unk_piece=_T5_UNKNOWN,
        num_threads=1,  # the order of sums, and with it the last bits of scores, must not depend on the machine
        minloglevel=2,
    )
    return model.getvalue()


def _pieces_of(model: bytes) -> list[tuple[str, float]]:
    """Return the pieces and scores of a model, by id."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [(processor.id_to_piece(index), processor.get_score(index)) for index in range(len(processor))]


def _fast_tokenizer(vocabulary: list[tuple[str, float]], special: list[str]) -> str:
    """Return the same tokenizer in the JSON format of the `tokenizers` library."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=False))
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", _T5_END], pair=["$A", _T5_END, "$B", _T5_END], special_tokens=[(_T5_END, 1)]
    )
    return tokenizer.to_str(pretty=True)


def _special_token(content: str, *, normalized: bool = False) -> dict[str, Any]:
    """Return a special token in the form of the tokenizers' files."""
    return {"content": content, "lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, keys in the order given."""
    _write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    """Write UTF-8 with the same line endings on every system."""
    path.write_text(text, encoding="utf-8", newline="\n")
