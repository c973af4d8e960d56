"""Which versions of what made the images, or the figures; nothing is imported to find out."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable
from contextlib import suppress

OF_A_RUN = ("flux-batch", "torch", "transformers", "ray", "pillow")


def versions(packages: Iterable[str] = OF_A_RUN) -> dict[str, str | None]:
    """Return the versions of Python and of packages on this machine; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        found[name] = None
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
