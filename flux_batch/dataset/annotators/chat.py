"""Requests to a vision model with an OpenAI-compatible API: retries, tokens, answers by JSON schema."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.message import Message
from http import HTTPStatus
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError

from PIL import Image

from flux_batch.errors import FluxBatchError, JobError, StoreError, one_line

_OPENAI = "https://api.openai.com/v1"
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_JPEG_QUALITY = 90
_MAX_QUOTED = 200
# Answers that a retry does not change, for any image.
_REFUSALS = {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND}
_PASSING = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.CONFLICT, HTTPStatus.TOO_MANY_REQUESTS}


class BadAnswer(FluxBatchError):
    """A vision model gave no answer of the requested kind."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The text of an answer, and the tokens of all its requests."""

    text: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A vision model. url: the address without `/chat/completions`; key_variable: the variable with the API key."""

    model: str
    url: str = ""
    key_variable: str = "OPENAI_API_KEY"
    schema: Mapping[str, Any] | None = None
    max_tokens: int = 512
    temperature: float = 0.0
    image_side: int = 1024
    attempts: int = 5
    timeout_s: float = 120.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def ask(self, image: Image.Image, question: str) -> Answer:
        """Return the answer to a question about an image; with a schema, the answer is JSON.

        Raises: JobError if the address refuses the key or the model; StoreError if it does not answer; BadAnswer.
        """
        body = json.dumps(self._body(image, question)).encode()
        prompt_tokens = completion_tokens = 0
        last: Exception = BadAnswer(f"{self.model} was not asked")
        for attempt in range(self.attempts):
            answer = self._request(body)
            if isinstance(answer, _Pause):
                last = StoreError(f"{self._address}: no answer after {self.attempts} attempts: {answer.reason}")
                if attempt + 1 < self.attempts:
                    time.sleep(answer.seconds or _pause_s(attempt))
                continue
            text, usage = _content(answer), answer.get("usage") or {}
            prompt_tokens += int(usage.get("prompt_tokens") or 0)
            completion_tokens += int(usage.get("completion_tokens") or 0)
            if text and (self.schema is None or _is_object(text)):
                return Answer(text, prompt_tokens, completion_tokens)
            given = f"answered {text[:_MAX_QUOTED]!r}" if text else "gave an empty answer"
            last = BadAnswer(f"{self.model} {given}{', which is no JSON object' if self.schema else ''}")
        raise last

    @property
    def _address(self) -> str:
        return (self.url or os.environ.get("OPENAI_BASE_URL") or _OPENAI).rstrip("/")

    def _body(self, image: Image.Image, question: str) -> dict[str, Any]:
        options = {"max_tokens": self.max_tokens, "temperature": self.temperature, **self.extra}
        if self.schema is not None:
            form = {"name": "answer", "schema": dict(self.schema), "strict": True}
            options["response_format"] = {"type": "json_schema", "json_schema": form}
        content = [
            {"type": "text", "text": question},
            {"type": "image_url", "image_url": {"url": self._data_url(image)}},
        ]
        return {"model": self.model, "messages": [{"role": "user", "content": content}], **options}

    def _data_url(self, image: Image.Image) -> str:
        small = image.copy()
        small.thumbnail((self.image_side, self.image_side))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=_JPEG_QUALITY)
        return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"

    def _request(self, body: bytes) -> dict[str, Any] | _Pause:
        """Return the answer to one request, or the pause before the next one."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self._address}/chat/completions", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                return dict(json.loads(response.read()))
        except HTTPError as error:
            with error:
                return self._refused(error.code, _quoted(error.read()), error.headers)
        except (OSError, HTTPException, ValueError, TypeError) as error:
            return _Pause(one_line(error))

    def _refused(self, code: int, text: str, headers: Message) -> _Pause:
        if code in _REFUSALS:
            raise JobError(
                f"{self._address}: refused {self.model} ({code}: {text}); check {self.key_variable} and model"
            )
        if code in _PASSING or code >= HTTPStatus.INTERNAL_SERVER_ERROR:
            after = headers.get("Retry-After", "")
            seconds = min(float(after), _LONGEST_PAUSE_S) if after.replace(".", "", 1).isdecimal() else 0.0
            return _Pause(f"{code}: {text}", seconds)
        raise BadAnswer(f"{self.model} refused the request ({code}: {text})")


@dataclass(frozen=True, slots=True)
class _Pause:
    """The reason to ask again, and the seconds to wait before; 0 if the server named none."""

    reason: str
    seconds: float = 0.0


def _quoted(data: bytes) -> str:
    """Return the beginning of a server's answer as one line."""
    return " ".join(data.decode(errors="replace").split())[:_MAX_QUOTED]


def _pause_s(attempt: int) -> float:
    longest: float = min(_FIRST_PAUSE_S * 2.0**attempt, _LONGEST_PAUSE_S)
    return random.uniform(0.5, 1.0) * longest


def _content(answer: Mapping[str, Any]) -> str:
    try:
        return str(answer["choices"][0]["message"]["content"] or "").strip()
    except (KeyError, IndexError, TypeError):
        return ""


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
