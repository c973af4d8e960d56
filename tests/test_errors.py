from __future__ import annotations

import pickle
import re
from collections.abc import Iterator

import pytest

from flux_batch import errors
from flux_batch.errors import FluxBatchError, InvalidSetting, bytes_text, number_text, work_text


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


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (0.01234, "0.0123"),
        (7.0, "7"),
        (12.345, "12.3"),
        (999.4, "999"),
        (999.7, "1000"),
        (1e6 + 0.5, "1000000"),
    ],
)
def test_a_number_is_never_a_power_of_ten(number: float, text: str) -> None:
    assert number_text(number) == text


@pytest.mark.parametrize(
    ("hours", "text"),
    [
        (0, "0 GPU-hours"),
        (1e-5, "0.036 GPU-seconds"),
        (0.099, "356 GPU-seconds"),
        (0.1, "0.1 GPU-hours"),
        (55_555.5, "55556 GPU-hours"),
    ],
)
def test_work_is_hours_or_few_seconds(hours: float, text: str) -> None:
    assert work_text(hours, "GPU") == text
