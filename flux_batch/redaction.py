"""What may be written down and shown of addresses, storage options and texts: nothing that may be a secret."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

REDACTED = "(redacted)"
# The storage options that carry no secret; every other value is redacted wherever a config is written down.
PUBLIC_OPTIONS = frozenset(
    {"anon", "client_kwargs", "endpoint_url", "profile", "region_name", "requester_pays", "use_ssl"}
)
# The settings that hold addresses.
ADDRESSES = frozenset({"uri", "input_image", "input_image_root"})
USER = re.compile(r"://[^/\s'\"]*@")
# A web address is signed in its query. Elsewhere a question mark belongs to a name or a pattern.
QUERY = re.compile(r"(\bhttps?://[^\s'\"?]*)(\?[^\s'\"]*)", re.IGNORECASE)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# What ends an address in a sentence, and is none of it.
STOPS = ",:;.)"


def public_uri(uri: str) -> str:
    """Return an address without what may be a secret: user and password, and a web address's query."""
    uri = re.sub("://[^/]*@", "://", uri)
    return re.sub(r"(\bhttps?://[^?]*)\?.*", r"\1", uri, flags=re.IGNORECASE | re.DOTALL)


def public_text(text: str) -> str:
    """Return a text with its addresses made public."""
    return QUERY.sub(lambda found: found[1] + found[2][len(found[2].rstrip(STOPS)) :], USER.sub("://", text))


def plain_text(text: str) -> str:
    """Return a text that a terminal only shows: public, with its control characters spelled out."""
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", public_text(text))


def public_tree(value: Any, name: str = "") -> Any:
    """Return settings, or the value of the one called `name`, with their addresses made public."""
    if isinstance(value, dict):
        return {key: public_tree(each, key) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(public_tree(each, name) for each in value)
    return public_uri(value) if name in ADDRESSES and isinstance(value, str) else value


def redact(options: Mapping[str, Any]) -> dict[str, Any]:
    """Replace every value that may be a secret; addresses lose theirs."""
    return {key: _public_value(key, value) for key, value in options.items()}


def _public_value(key: str, value: Any) -> Any:
    if key not in PUBLIC_OPTIONS:
        return REDACTED
    if isinstance(value, Mapping):
        return redact(value)
    if isinstance(value, str):
        return public_uri(value)
    return value if value is None or isinstance(value, (bool, int, float)) else REDACTED
