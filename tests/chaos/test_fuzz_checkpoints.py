"""Damaged model folders lead to an error of one sentence or to images, never to a traceback.

The tests change bytes of any file, and values in a config, an index or a header.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos.figures import Figures
from chaos.sandbox import Sandbox, fuzz
from helpers.tiny_flux import make_tiny_repository

SHORT, LONG = 6, 150
ODD = st.sampled_from(
    [None, True, -1, 0, 1, 3, 2**31, 2**63, 10**30, 1e300, float("nan"), "", "x", "F8_E4M3", [], {}, [0]]
)


@pytest.fixture(scope="module", params=["diffusers", "original"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model folder."""
    return make_tiny_repository(tmp_path_factory.mktemp("whole"), layout=request.param)


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    box = Sandbox(tmp_path, monkeypatch)
    box.write_job(tmp_path / "model")
    return box


def attempt(sandbox: Sandbox, whole: Path, name: Path, changed: bytes) -> int:
    """Run a job with a model in which one file is changed. Returns: the exit code."""
    model = sandbox.folder / "model"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(whole, model)
    (model / name).write_bytes(changed)
    return sandbox.flux_batch("run", str(sandbox.folder / "job.yaml")).code


def files_of(whole: Path) -> list[Path]:
    return sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())


def check_bytes(sandbox: Sandbox, whole: Path, count: int) -> list[int]:
    """Change or remove some bytes of a file. Returns: the exit codes."""
    codes: list[int] = []

    @fuzz(count)
    @given(st.sampled_from(files_of(whole)), st.floats(0, 1), st.integers(0, 40), st.binary(max_size=40), st.booleans())
    def check(name: Path, share: float, length: int, instead: bytes, in_header: bool) -> None:
        data = (whole / name).read_bytes()
        place = round(share * min(len(data), 2000 if in_header else len(data)))
        codes.append(attempt(sandbox, whole, name, data[:place] + instead + data[place + length :]))

    check()
    return codes


def check_values(sandbox: Sandbox, whole: Path, count: int) -> list[int]:
    """Change a value of a JSON file or of a header, which remains valid JSON. Returns: the exit codes."""
    codes: list[int] = []
    names = [name for name in files_of(whole) if name.suffix in (".json", ".safetensors")]

    @fuzz(count)
    @given(st.data(), st.sampled_from(names), ODD)
    def check(data: st.DataObject, name: Path, instead: Any) -> None:
        text, around = json_of((whole / name).read_bytes(), name.suffix)
        tree = json.loads(text)
        node, key = tree, data.draw(st.sampled_from(sorted(tree)), label="key") if tree else "x"
        while isinstance(node.get(key), dict) and node[key] and data.draw(st.booleans(), label="deeper"):
            node = node[key]
            key = data.draw(st.sampled_from(sorted(node)), label="key")
        node[key] = instead
        codes.append(attempt(sandbox, whole, name, around(json.dumps(tree).encode())))

    check()
    return codes


def json_of(data: bytes, suffix: str) -> tuple[bytes, Callable[[bytes], bytes]]:
    """Return the JSON in a file, and a function that puts another JSON in its place."""
    if suffix == ".json":
        return data, lambda text: text
    (size,) = struct.unpack("<Q", data[:8])
    return data[8 : 8 + size], lambda text: struct.pack("<Q", len(text)) + text + data[8 + size :]


CHECKS = [check_bytes, check_values]


@pytest.mark.parametrize("check", CHECKS)
def test_a_damaged_model_is_named_or_used(
    sandbox: Sandbox, whole: Path, figures: Figures, check: Callable[..., list[int]]
) -> None:
    codes = check(sandbox, whole, SHORT)
    figures.add(experiment="damaged models", store="-", faults=len(codes))
    assert {0, 2} <= set(codes)  # both harmless and harmful changes


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("check", CHECKS)
def test_many_damaged_models_are_named_or_used(
    sandbox: Sandbox, whole: Path, figures: Figures, check: Callable[..., list[int]]
) -> None:
    codes = check(sandbox, whole, LONG)
    figures.add(experiment="damaged models", store="-", faults=len(codes))
    assert {0, 2} <= set(codes)
