import json
import logging
import time
from collections.abc import Iterator

import pytest

from flux_batch.report import webhook
from flux_batch.report.webhook import post_to_webhook, webhook_address
from helpers.web_server import WebServer, redirect, status, web_server


@pytest.fixture
def server() -> Iterator[WebServer]:
    with web_server() as running:
        yield running


def test_the_end_of_a_run_is_posted_as_json(server: WebServer, caplog: pytest.LogCaptureFixture) -> None:
    post_to_webhook(server.at("/hook", b"ok"), "cats: 3 images, 0 failed", 0, output="s3://b/cats")
    (body,) = server.posted
    assert json.loads(body) == {"text": "cats: 3 images, 0 failed", "exit_code": 0, "output": "s3://b/cats"}
    assert not caplog.records


def test_nothing_is_posted_unless_the_environment_names_an_address(
    server: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLUX_BATCH_WEBHOOK", raising=False)
    post_to_webhook(webhook_address(), "cats", 0)
    assert not server.posted
    monkeypatch.setenv("FLUX_BATCH_WEBHOOK", server.at("/hook", b"ok"))
    post_to_webhook(webhook_address(), "cats", 0)
    assert len(server.posted) == 1


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(status(500), "with 500"), (redirect("http://127.0.0.1:9/"), "with 302"), (lambda _: time.sleep(1), "timed out")],
    ids=["an error", "a redirect", "silence"],
)
def test_a_failure_is_a_warning_without_the_address(
    server: WebServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, answer: object, reason: str
) -> None:
    monkeypatch.setattr(webhook, "TIMEOUT_S", 0.2)
    server.answers["/secret"] = answer  # type: ignore[assignment]
    post_to_webhook(f"{server.url}/secret", "cats", 0)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert reason in record.getMessage()
    assert "secret" not in record.getMessage()


@pytest.mark.parametrize(
    "address", ["file:///etc/passwd", "secret", "http://[secret", "http://secret host/", "http://"]
)
def test_an_address_that_is_not_http_is_a_warning(address: str, caplog: pytest.LogCaptureFixture) -> None:
    post_to_webhook(address, "cats", 0)
    (record,) = caplog.records
    assert "was not posted" in record.getMessage()
    assert "secret" not in record.getMessage()
