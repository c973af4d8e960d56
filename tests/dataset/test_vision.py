"""Captions and answers of a vision model: requests, retries, cost, and invalid answers."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import pytest
from PIL import Image

from flux_batch.dataset.annotators.checked import CheckedAnnotator
from flux_batch.dataset.annotators.vision import Ask, Caption
from flux_batch.errors import InvalidSetting, JobError, StoreError
from helpers.vision_server import vision_server

SCHEMA = {
    "type": "object",
    "properties": {
        "animal": {"type": "string"},
        "legs": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "where": {"type": "object"},
    },
    "required": ["animal", "legs"],
}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flux_batch.dataset.annotators.chat.time.sleep", lambda seconds: None)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")


def images(number: int) -> list[Image.Image]:
    return [Image.new("RGB", (64, 32), (number, 0, 0)) for number in range(number)]


def records(number: int) -> list[dict[str, Any]]:
    return [{"key": str(index), "prompt": f"prompt {index}"} for index in range(number)]


def test_each_image_is_captioned_with_its_tokens_and_no_more_at_once_than_allowed() -> None:
    with vision_server(lambda body, number: f" a caption of {_text(body)} ") as server:
        caption = Caption("some-model", "of {prompt}, {nothing}", url=server.url, concurrency=2, image_side=16)
        columns = caption(images(5), records(5))
    assert columns["caption"] == [f"a caption of of prompt {index}, {{nothing}}" for index in range(5)]
    assert columns["prompt_tokens"] == [100] * 5
    assert (server.most_at_once <= 2, server.keys) == (True, {"Bearer secret"})
    address = server.requests[0]["messages"][0]["content"][1]["image_url"]["url"]
    sent = Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/jpeg;base64,"))))
    assert (sent.size, server.requests[0]["model"]) == ((16, 8), "some-model")


def _text(body: dict[str, Any]) -> str:
    return str(body["messages"][0]["content"][0]["text"])


def test_answers_by_schema_are_columns_and_cost_is_counted_with_the_repetitions() -> None:
    good = json.dumps({"animal": "cat", "legs": 4, "tags": ["a", "b"], "where": {"in": "house"}})
    answers: list[str | int] = [429, "no JSON", 500, good]
    with vision_server(lambda body, number: answers[number]) as server:
        ask = Ask("m", "which?", schema=SCHEMA, url=server.url, input_price=2.0, output_price=10.0)
        (row,) = CheckedAnnotator(ask, "ask").rows(images(1), records(1))
    assert row == {
        "animal": "cat",
        "legs": 4,
        "tags": ["a", "b"],
        "where": '{"in": "house"}',
        "prompt_tokens": 200,
        "completion_tokens": 20,
        "cost": pytest.approx((200 * 2 + 20 * 10) / 1e6),
    }
    assert server.requests[0]["response_format"]["json_schema"]["schema"] == SCHEMA


def test_an_answer_that_is_none_costs_its_image_and_no_other_request() -> None:
    wrong = {"prompt 1": '{"animal": "cat"}', "prompt 2": '{"animal": "cat", "legs": "four"}', "prompt 3": 400}
    good = '{"animal": "cat", "legs": 4}'
    with vision_server(lambda body, number: wrong.get(_text(body), good)) as server:
        checked = CheckedAnnotator(Ask("m", "{prompt}", schema=SCHEMA, url=server.url), "ask")
        first, missing, mistyped, refused, last = checked.rows(images(5), records(5))
    assert (first["legs"], last["legs"]) == (4, 4)  # type: ignore[index]
    assert "left out legs" in str(missing)
    assert "answered legs = 'four', not int64" in str(mistyped)
    assert "refused the request (400" in str(refused)
    assert len(server.requests) == 5


def test_null_is_an_answer_where_the_schema_allows_it() -> None:
    properties = {
        "score": {"type": ["number", "null"]},
        "legs": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "either": {"type": ["number", "string"]},
        "name": {"type": "string"},
    }
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    values = {"score": None, "legs": None, "either": 1, "name": "cat"}
    answers = {
        "prompt 0": values,
        "prompt 1": {**values, "score": 0.5, "legs": 4},
        "prompt 2": {**values, "name": None},
    }
    with vision_server(lambda body, number: json.dumps(answers[_text(body)])) as server:
        ask = Ask("m", "{prompt}", schema=schema, url=server.url)
        first, second, third = CheckedAnnotator(ask, "ask").rows(images(3), records(3))
    assert [str(kind) for kind in ask.columns.types[:4]] == ["double", "int64", "string", "string"]
    assert [(row["score"], row["legs"], row["either"]) for row in (first, second)] == [  # type: ignore[index]
        (None, None, "1"),
        (0.5, 4, "1"),
    ]
    assert "left out name" in str(third)


def test_an_address_that_refuses_or_is_away_ends_the_pass() -> None:
    with vision_server(lambda body, number: 401) as server:
        checked = CheckedAnnotator(Caption("m", url=server.url, attempts=2), "caption")
        with pytest.raises(JobError, match="check OPENAI_API_KEY and model"):
            checked.rows(images(2), records(2))
    with pytest.raises(StoreError, match="no answer after 2 attempts"):
        checked.rows(images(2), records(2))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"concurrency": 0}, "must be at least 1"),
        ({"input_price": 1.0}, "give both, or neither"),
        ({"schema": {"type": "string"}}, "must be a JSON schema of an object"),
    ],
)
def test_wrong_options_are_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidSetting, match=sentence):
        Ask("m", "what?", **options)
