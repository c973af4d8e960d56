"""Tell a web address how a run ended: one short JSON object, for a chat room or a scheduler.

The address comes from the environment and not from the job file: that of a chat room is a secret.
"""

from __future__ import annotations

import json
import logging
import os
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError

VARIABLE = "FLUX_BATCH_WEBHOOK"
PATIENCE_S = 10.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Webhook:
    """Where to post to; nowhere, if the environment names no address."""

    address: str = ""

    @classmethod
    def from_environment(cls) -> Webhook:
        """Read `FLUX_BATCH_WEBHOOK`."""
        return cls(os.environ.get(VARIABLE, ""))

    def post(self, text: str, exit_code: int, **facts: Any) -> None:
        """Post `text`, which chat rooms show, and facts for programs. What goes wrong is a warning: the run is over."""
        if not self.address:
            return
        body = json.dumps({"text": text, "exit_code": exit_code, **facts}).encode()
        try:
            if not self.address.startswith(("https://", "http://")):
                raise ValueError("not an http or https address")
            request = urllib.request.Request(self.address, body, {"Content-Type": "application/json"})
            urllib.request.build_opener(_NoRedirect).open(request, timeout=PATIENCE_S).close()
        except HTTPError as error:
            error.close()
            log.warning("%s: the end of the run was not posted: the answer was %d", VARIABLE, error.code)
        except OSError as error:
            log.warning("%s: the end of the run was not posted: %s", VARIABLE, error)
        except (ValueError, HTTPException) as error:  # their messages quote the address
            log.warning("%s: the end of the run was not posted: %s", VARIABLE, type(error).__name__)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Takes a redirect for an error: what follows one would be asked for, and not posted to."""

    def redirect_request(self, *_: Any) -> None:
        """Follow nothing."""
