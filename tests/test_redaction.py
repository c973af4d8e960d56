"""Values that may be secret are never written, and all others stay readable."""

from __future__ import annotations

import pytest

from flux_batch.errors import StoreError
from flux_batch.redaction import REDACTED, plain_text, public_text, public_tree, public_uri, redact, without_redacted


@pytest.mark.parametrize(
    ("uri", "public"),
    [
        ("https://me:hush@host/a/b?sig=hush", "https://host/a/b"),
        ("HTTPS://host/a b?sig='hush' hush", "HTTPS://host/a b"),
        ("filecache::https://host/a?sig=hush", "filecache::https://host/a"),
        ("simplecache::s3://key:hush@bucket/a", "simplecache::s3://bucket/a"),
        ("ftp://me:hush@host/a", "ftp://host/a"),
        ("s3://bucket/part-?.parquet", "s3://bucket/part-?.parquet"),
        ("s3://bucket/a@1/b", "s3://bucket/a@1/b"),
        ("hf://owner/name@revision/x", "hf://owner/name@revision/x"),
        ("/plain/path@x?y", "/plain/path@x?y"),
    ],
)
def test_an_address_is_written_without_its_secrets(uri: str, public: str) -> None:
    assert public_uri(uri) == public


def test_every_address_in_a_text_is_made_public() -> None:
    text = (
        "s3://k:hush@b/x: cannot read: 'https://h/a?X-Signature=hush': no; see http://h/b?c=hush, or who@example.org?"
    )
    assert public_text(text) == "s3://b/x: cannot read: 'https://h/a': no; see http://h/b, or who@example.org?"


def test_a_terminal_shows_a_text_and_obeys_none_of_it() -> None:
    assert plain_text("a\x1b[2J\x9b\r b\tc\nd é ☃") == "a\\x1b[2J\\x9b\\x0d b\tc\nd é ☃"


def test_no_error_has_a_secret_in_its_message() -> None:
    assert str(StoreError("https://h/a?sig=hush: cannot read")) == "https://h/a: cannot read"


def test_options_are_written_by_a_list_of_those_that_are_public() -> None:
    options = {
        "key": "hush",
        "token": None,
        "endpoint_url": "https://me:hush@host:9000/x?y=hush",
        "anon": ["hush"],
        "use_ssl": True,
        "client_kwargs": {"region_name": "eu", "headers": {"Authorization": "hush"}, "profile": {"hush": "hush"}},
    }
    assert redact(options) == {
        "key": REDACTED,
        "token": REDACTED,
        "endpoint_url": "https://host:9000/x",
        "anon": REDACTED,
        "use_ssl": True,
        "client_kwargs": {"region_name": "eu", "headers": REDACTED, "profile": {"hush": REDACTED}},
    }
    assert without_redacted(redact(options)) == {
        "endpoint_url": "https://host:9000/x",
        "use_ssl": True,
        "client_kwargs": {"region_name": "eu", "profile": {}},
    }


def test_addresses_among_options_are_public_under_any_name() -> None:
    """The options of users' annotators and pipelines are written into the job.yaml of a run."""
    options = {
        "model": "https://h/m?sig=hush",
        "heads": ["s3://k:hush@b/x", "why?"],
        "more": {"url": "HTTP://h?s=hush"},
    }
    public = {"model": "https://h/m", "heads": ["s3://b/x", "why?"], "more": {"url": "HTTP://h"}}

    for name in ("options", "pipeline_options"):
        assert public_tree({name: options}) == {name: public}
        assert public_tree(options, name) == public
    question = {"question": "Is it like https://h/a?sig=hush, or not?"}
    assert public_tree(question, "options") == question
