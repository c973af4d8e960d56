"""The import of user code that a job file names as `module:factory`."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from flux_batch.errors import JobError, one_line

FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def imported(text: str, folder: str, product: str) -> Callable[..., Any]:
    """Import the callable named by `module:factory`; its module may also lie in `folder`.

    product: the noun for the result of the factory, for messages. Raises: JobError if the module or the name cannot be
    imported, or is not callable.
    """
    module, _, path = text.partition(":")
    if folder and folder not in sys.path and os.path.isdir(folder):
        sys.path.insert(0, folder)
    try:
        found: Any = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise JobError(f"{text}: cannot be imported: {one_line(error)}") from error
    except Exception as error:  # a user's module may raise anything
        raise JobError(f"{text}: cannot be imported: {type(error).__name__}: {one_line(error)}") from error
    if not callable(found):
        raise JobError(f"{text}: must be a class or a function that returns {product}")
    return found  # type: ignore[no-any-return]


def check_options(
    factory: Callable[..., Any], options: Mapping[str, Any], name: str, hint: str, *first: str, **given: Any
) -> None:
    """Raise JobError unless a factory takes these options.

    first: the names of its first arguments. given: further arguments of the call. name: the name of the factory, for
    messages. hint: how to set an option, for messages.
    """
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # C code has no signature
        return
    try:
        signature.bind(*first, **given, **options)
    except TypeError as error:
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        names = [each for each, one in signature.parameters.items() if one.kind not in kinds and each not in given]
        own = ", ".join(names[len(first) :]) or "none"
        raise JobError(f"{name}: {one_line(error)}; its options are {own} ({hint})") from error
