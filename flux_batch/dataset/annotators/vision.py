"""Annotators that ask a vision model: captions, and answers to questions of your own."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
from PIL import Image

from flux_batch.dataset.annotators.chat import Answer, BadAnswer, Chat
from flux_batch.errors import InvalidSetting

_TOKENS = (pa.field("prompt_tokens", pa.int32()), pa.field("completion_tokens", pa.int32()))
_KINDS = {"string": pa.string(), "number": pa.float64(), "integer": pa.int64(), "boolean": pa.bool_()}
_CAPTION = "Describe this image in one or two sentences: what is in it, where, and how it looks. No preamble."


class Ask:
    """The answers of a vision model to a question about each image, with their tokens.

    If token prices are given, there is also the cost. Without a schema there is one column, `answer`. With a JSON
    schema of an object, its properties are the columns.
    """

    version = "1"
    execution_options = frozenset({"url", "key_variable", "concurrency", "attempts", "timeout_s"})
    column = "answer"

    def __init__(
        self,
        model: str,
        question: str,
        schema: Mapping[str, Any] | None = None,
        concurrency: int = 8,
        input_price: float | None = None,
        output_price: float | None = None,
        **options: Any,
    ) -> None:
        """Set the model and the question.

        question: `{prompt}` in it is replaced by that column of the record; so are other columns. schema: of the
        answer. concurrency: requests at a time. input_price, output_price: for a million tokens. options: `url`,
        `key_variable`, `max_tokens`, `temperature`, `image_side`, `attempts`, `timeout_s` and `extra` request fields.
        Raises: InvalidSetting.
        """
        if concurrency < 1:
            raise InvalidSetting(f"concurrency = {concurrency}: must be at least 1", field="concurrency")
        if (input_price is None) != (output_price is None):
            raise InvalidSetting("input_price and output_price: give both, or neither", field="input_price")
        self._question = question
        self._schema = schema
        self._prices = None if input_price is None or output_price is None else (input_price, output_price)
        self._chat = Chat(model=model, schema=schema, **options)
        self._threads = ThreadPoolExecutor(concurrency, "ask")
        answers = [pa.field(self.column, pa.string())] if schema is None else _fields(schema)
        self.columns = pa.schema([*answers, *_TOKENS, *([pa.field("cost", pa.float64())] if self._prices else [])])

    def __call__(self, images: Sequence[Image.Image], records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return the columns; for an image without an answer, the value is the error."""
        rows = list(self._threads.map(self._row, images, records))
        return {name: [row if isinstance(row, BadAnswer) else row[name] for row in rows] for name in self.columns.names}

    def _row(self, image: Image.Image, record: Mapping[str, Any]) -> dict[str, Any] | BadAnswer:
        question = re.sub(r"\{(\w+)\}", lambda found: str(record.get(found[1], found[0])), self._question)
        try:
            answer = self._chat.ask(image, question)
            return self._values(answer) | self._tokens(answer)
        except BadAnswer as error:
            return error

    def _values(self, answer: Answer) -> dict[str, Any]:
        if self._schema is None:
            return {self.column: answer.text}
        found = json.loads(answer.text)
        values = {}
        for field in _fields(self._schema):
            value = found.get(field.name)
            can_be_null = "null" in _types(self._schema["properties"][field.name])
            if value is None and field.name in self._schema.get("required", []) and not can_be_null:
                raise BadAnswer(f"{self._chat.model} left out {field.name}: {answer.text[:200]}")
            is_text = field.type == pa.string() and value is not None and not isinstance(value, str)
            values[field.name] = json.dumps(value, ensure_ascii=False) if is_text else value
            try:
                pa.array([values[field.name]], field.type)
            except (pa.ArrowException, TypeError, ValueError, OverflowError):
                raise BadAnswer(f"{self._chat.model} answered {field.name} = {value!r}, not {field.type}") from None
        return values

    def _tokens(self, answer: Answer) -> dict[str, Any]:
        tokens = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
        if self._prices is None:
            return tokens
        input_price, output_price = self._prices
        return tokens | {
            "cost": (answer.prompt_tokens * input_price + answer.completion_tokens * output_price) / 1_000_000
        }


class Caption(Ask):
    """A caption of each image by a vision model."""

    column = "caption"

    def __init__(self, model: str, question: str = _CAPTION, **options: Any) -> None:
        """Set the model; `options` are those of Ask."""
        super().__init__(model, question, **options)


def _fields(schema: Mapping[str, Any]) -> list[pa.Field]:
    """Return the columns for the properties of a JSON schema of an object. Raises: InvalidSetting."""
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    if not isinstance(properties, Mapping) or not properties:
        raise InvalidSetting("schema: must be a JSON schema of an object, with `properties`", field="schema")
    return [pa.field(str(name), _kind(each)) for name, each in properties.items()]


def _kind(schema: Any) -> pa.DataType:
    """Return the Arrow type of a JSON schema; anything but plain values and lists of them is stored as JSON text."""
    types = _types(schema) - {"null"}
    if types == {"array"}:
        return pa.list_(_kind(schema.get("items"))) if "items" in schema else pa.string()
    return _KINDS.get(types.pop(), pa.string()) if len(types) == 1 else pa.string()


def _types(schema: Any) -> set[str]:
    """Return the types that a JSON schema allows: one, a list of them, or those of `anyOf`."""
    if not isinstance(schema, Mapping):
        return set()
    own = schema.get("type", ())
    return ({own} if isinstance(own, str) else {*own}).union(*map(_types, schema.get("anyOf", ())))
