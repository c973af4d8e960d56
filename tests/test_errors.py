from __future__ import annotations

import pickle
import re
from collections.abc import Iterator

import pytest

from flux_batch import errors
from flux_batch.errors import FluxBatchError, InvalidSetting, bytes_text


def tree(base: type[FluxBatchError] = FluxBatchError) -> Iterator[type[FluxBatchError]]:
    yield base
    for child in base.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from tree(child)


@pytest.mark.parametrize("kind", list(tree()), ids=lambda kind: kind.__name__)
def test_every_error_survives_pickling(kind: type[FluxBatchError]) -> None:
    error = kind("what, where, what would be right")

    again = pickle.loads(pickle.dumps(error))

    assert type(again) is kind
    assert str(again) == str(error) == "what, where, what would be right"
    assert again.exit_code == kind.exit_code


def test_the_context_of_an_error_survives_too() -> None:
    again = pickle.loads(pickle.dumps(InvalidSetting("width = 7", field="width")))

    assert (str(again), again.field) == ("width = 7", "width")


def test_the_drawing_shows_the_tree_and_its_exit_codes() -> None:
    drawn = dict(re.findall(r"^ {4}[|`\- ]*([A-Z]\w+) +(?:exit (\d+))?", errors.__doc__ or "", re.MULTILINE))
    kinds = {kind.__name__: kind for kind in tree()}

    assert set(drawn) == set(kinds)
    for name, code in drawn.items():
        if code:
            assert kinds[name].exit_code == int(code), name


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_999, "1.0 MB"), (5e15, "5,000.0 TB")],
)
def test_bytes_text(num_bytes: float, text: str) -> None:
    assert bytes_text(num_bytes) == text
