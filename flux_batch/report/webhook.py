"""The webhook: a short JSON object posted at the end of a run, for a chat room or a scheduler.

Its address comes from the environment and not from the job file, since the address of a chat room is a secret.
"""

from __future__ import annotations

import json
import logging
import os
import urllib.request
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError

_VARIABLE = "FLUX_BATCH_WEBHOOK"
TIMEOUT_S = 10.0

log = logging.getLogger(__name__)


def webhook_address() -> str:
    """Return the address in `FLUX_BATCH_WEBHOOK`; "" if it is not set."""
    return os.environ.get(_VARIABLE, "")


def post_to_webhook(address: str, text: str, exit_code: int, **facts: Any) -> None:
    """Post `text`, which chat rooms show, and `facts` for programs; do nothing without an address.

    A failure is logged as a warning, since the run is over by then.
    """
    if not address:
        return
    body = json.dumps({"text": text, "exit_code": exit_code, **facts}).encode()
    try:
        if not address.startswith(("https://", "http://")):
            raise ValueError("not an http or https address")
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        urllib.request.build_opener(_NoRedirect).open(request, timeout=TIMEOUT_S).close()
    except HTTPError as error:
        error.close()
        log.warning("%s: the end of the run was not posted: the server answered with %d", _VARIABLE, error.code)
    except OSError as error:
        log.warning("%s: the end of the run was not posted: %s", _VARIABLE, error)
    except (ValueError, HTTPException) as error:  # their messages quote the address
        log.warning("%s: the end of the run was not posted: %s", _VARIABLE, type(error).__name__)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A handler that treats a redirect as an error: the target would get a GET without the body."""

    def redirect_request(self, *_: Any) -> None:
        """Follow no redirect."""
