"""The tokenizers of both text encoders, from transformers: prompts in, token ids out.

Does not import torch, which would add half to the time in which a plan counts tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from transformers import CLIPTokenizer, T5Tokenizer

# The files of each tokenizer class; one of the listed sets is enough.
_TOKENIZER_FILES = {
    CLIPTokenizer: (("tokenizer.json",), ("vocab.json", "merges.txt")),
    T5Tokenizer: (("tokenizer.json",), ("spiece.model",)),
}
# A call sets the tokenizer's truncation and padding and then reads the texts; a concurrent call would change these.
_TURNS = Lock()


def tokenize(tokenizer: Any, prompts: Sequence[str], length: int) -> list[list[int]]:
    """Return the token ids of each prompt, truncated or padded to `length`."""
    batch = _read(tokenizer, list(prompts), padding="max_length", max_length=length, truncation=True)
    ids: list[list[int]] = batch.input_ids
    return ids


def count_tokens(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    """Return the number of tokens of each whole prompt, special tokens included."""
    return [len(ids) for ids in _read(tokenizer, list(prompts), verbose=False).input_ids]


def left_out(tokenizer: Any, prompt: str, length: int) -> str:
    """Return the end of a prompt that does not fit into `length` tokens; "" if all of it fits."""
    batch = _read(tokenizer, prompt, max_length=length, truncation=True, return_offsets_mapping=True, verbose=False)
    if len(batch.input_ids) < length or count_tokens(tokenizer, [prompt])[0] <= length:
        return ""
    return prompt[max(end for _, end in batch.offset_mapping) :]


def _read(tokenizer: Any, texts: str | list[str], **how: Any) -> Any:
    """Return the result of a tokenizer for texts; threads take turns."""
    with _TURNS:
        return tokenizer(texts, **how)


def load_tokenizer(kind: Any, home: Path, name: str) -> Any:
    """Load a tokenizer from the folder `name` in `home` or beside it. Raises: ValueError if neither has its files."""
    folders = [home / name, home.parent / name]
    for folder in folders:
        if folder.is_dir():
            # Without its files transformers would create an empty tokenizer, to which all prompts are equal.
            if not any(all((folder / file).is_file() for file in files) for files in _TOKENIZER_FILES[kind]):
                needed = " or ".join(" and ".join(files) for files in _TOKENIZER_FILES[kind])
                raise ValueError(f"{folder} is not a tokenizer: it lacks {needed}")
            try:
                tokenizer = kind.from_pretrained(str(folder), local_files_only=True)
            except Exception as error:  # the package tokenizers raises plain Exception
                raise ValueError(f"{folder} holds a tokenizer that cannot be read: {error}") from error
            most = tokenizer.model_max_length
            if not isinstance(most, (int, float)) or not most >= 1:
                raise ValueError(f"{folder} holds a tokenizer that cannot be used: model_max_length = {most!r}")
            return tokenizer
    raise ValueError(
        f"no tokenizer: neither {folders[0]} nor {folders[1]} is there; put the folders tokenizer and tokenizer_2 of "
        "FLUX.1-dev or FLUX.1-schnell beside the weights"
    )


def load_tokenizers(home: Path) -> tuple[Any, Any]:
    """Load the tokenizers of CLIP and T5 from a model's folder or beside its file. Raises: ValueError."""
    return load_tokenizer(CLIPTokenizer, home, "tokenizer"), load_tokenizer(T5Tokenizer, home, "tokenizer_2")
