"""Redaction of possible secrets in addresses, storage options and texts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

REDACTED = "(redacted)"
# Storage options that hold no secret; all others are redacted wherever a config is written.
_PUBLIC_OPTIONS = frozenset(
    {"anon", "client_kwargs", "endpoint_url", "profile", "region_name", "requester_pays", "use_ssl"}
)
# Settings that hold addresses.
_ADDRESSES = frozenset({"uri", "file", "input_image", "input_image_root", "image_encoder", "wildcards"})
# Settings with the options of user code, which may be addresses under any name.
_OPTIONS = frozenset({"options", "pipeline_options"})
_ADDRESS = re.compile(r"\S*://\S+")
_USER = re.compile(r"://[^/\s'\"]*@")
# A web address has its signature in the query. Elsewhere a question mark is part of a name or a pattern.
_QUERY = re.compile(r"(\bhttps?://[^\s'\"?]*)(\?[^\s'\"]*)", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# Punctuation after an address in a sentence, which is not part of it.
_STOPS = ",:;.)"


def public_uri(uri: str) -> str:
    """Return an address without user, password and, for a web address, query."""
    uri = re.sub("://[^/]*@", "://", uri)
    return re.sub(r"(\bhttps?://[^?]*)\?.*", r"\1", uri, flags=re.IGNORECASE | re.DOTALL)


def public_text(text: str) -> str:
    """Return a text with the possible secrets of its addresses removed."""
    return _QUERY.sub(lambda found: found[1] + found[2][len(found[2].rstrip(_STOPS)) :], _USER.sub("://", text))


def plain_text(text: str) -> str:
    """Return a public text with control characters escaped, safe to print on a terminal."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", public_text(text))


def public_tree(value: Any, name: str = "") -> Any:
    """Return settings, or the value of the setting `name`, without the secrets of their addresses."""
    if name in _OPTIONS:
        return _public_options(value)
    if isinstance(value, dict):
        return {key: public_tree(each, key) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(public_tree(each, name) for each in value)
    return public_uri(value) if name in _ADDRESSES and isinstance(value, str) else value


def _public_options(value: Any) -> Any:
    """Return options without the possible secrets of texts that are addresses."""
    if isinstance(value, dict):
        return {key: _public_options(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_public_options, value))
    return public_uri(value) if isinstance(value, str) and _ADDRESS.fullmatch(value) else value


def redact(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return storage options with possible secrets redacted, also those in addresses."""
    return {key: _public_value(key, value) for key, value in options.items()}


def without_redacted(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return storage options without the redacted ones; the environment may supply those."""
    kept = {key: value for key, value in options.items() if value != REDACTED}
    return {key: without_redacted(value) if isinstance(value, Mapping) else value for key, value in kept.items()}


def _public_value(key: str, value: Any) -> Any:
    if key not in _PUBLIC_OPTIONS:
        return REDACTED
    if isinstance(value, Mapping):
        return redact(value)
    if isinstance(value, str):
        return public_uri(value)
    return value if value is None or isinstance(value, (bool, int, float)) else REDACTED
