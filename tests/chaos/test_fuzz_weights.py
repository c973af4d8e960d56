"""Weights damaged by a wrong converter or a broken download: a sentence or images, no traceback, no hang."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from chaos.figures import Figures
from chaos.sandbox import Sandbox, fuzz
from helpers.layout_files import write_gguf
from helpers.tiny_flux import make_tiny_repository

SHORT, LONG = 8, 600

TRANSFORMER = "flux1-tiny.safetensors"
GGUF = "flux1-tiny.gguf"
KINDS = st.sampled_from([torch.float32, torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64])
SHAPES = st.lists(st.sampled_from([0, 1, 16, 24, 32, 64]), max_size=4)


class Models:
    """A small intact model, and a sandbox to run damaged copies of it."""

    def __init__(self, sandbox: Sandbox, whole: Path) -> None:
        self.whole = whole
        self.weights = sorted(str(path.relative_to(whole)) for path in whole.rglob("*.safetensors"))
        self._sandbox = sandbox
        self._copy = sandbox.folder / "model"

    def run(self, name: str, data: bytes, *, instead_of: str = "") -> int:
        """Run a job on the model with `data` in the file `name`, without `instead_of`. Returns: the exit code."""
        shutil.rmtree(self._copy, ignore_errors=True)
        shutil.copytree(self.whole, self._copy)
        if instead_of:
            (self._copy / instead_of).unlink()
        (self._copy / name).write_bytes(data)
        return self._sandbox.flux_batch("run", str(self._sandbox.folder / "job.yaml")).code


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model in the original layout, and its transformer as GGUF beside the folder."""
    folder = make_tiny_repository(tmp_path_factory.mktemp("whole") / "model", layout="original")
    write_gguf(load_file(folder / TRANSFORMER), folder.parent / GGUF, "Q8_0")
    return folder


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, original: Path) -> Models:
    sandbox = Sandbox(tmp_path, monkeypatch)
    sandbox.write_job(tmp_path / "model")
    return Models(sandbox, original)


def check_tensors(models: Models, count: int) -> list[int]:
    """Write a valid file with one tensor missing, renamed, or of another shape or dtype."""
    codes: list[int] = []

    @fuzz(count)
    @given(st.data(), st.sampled_from(models.weights), SHAPES | st.none(), KINDS, st.sampled_from(["", "x", "same"]))
    def check(data: st.DataObject, name: str, shape: list[int] | None, kind: torch.dtype, renamed: str) -> None:
        state = load_file(models.whole / name)
        key = data.draw(st.sampled_from(sorted(state)), label="key")
        tensor = state.pop(key)
        if renamed:
            changed = tensor if shape is None else torch.ones(shape)
            state[key if renamed == "same" else renamed] = changed.to(kind)
        codes.append(models.run(name, save(state)))

    check()
    return codes


def check_gguf(models: Models, count: int) -> list[int]:
    """Damage or cut a GGUF file, often in its header."""
    codes: list[int] = []
    whole = (models.whole.parent / GGUF).read_bytes()
    assert models.run(GGUF, whole, instead_of=TRANSFORMER) == 0

    @fuzz(count)
    @given(st.integers(0, 4000) | st.floats(0, 1), st.integers(0, 80), st.binary(max_size=40), st.booleans())
    def check(place: float, length: int, noise: bytes, is_cut: bool) -> None:
        at = int(place * len(whole)) if isinstance(place, float) else place
        rest = b"" if is_cut else whole[at + length :]
        codes.append(models.run(GGUF, whole[:at] + noise + rest, instead_of=TRANSFORMER))

    check()
    return codes


CHECKS = [check_tensors, check_gguf]


@pytest.mark.parametrize("check", CHECKS)
def test_damaged_weights_are_named_or_used(models: Models, figures: Figures, check: Callable[..., list[int]]) -> None:
    judge(figures, check(models, SHORT))


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("check", CHECKS)
def test_many_damaged_weights_are_named_or_used(
    models: Models, figures: Figures, check: Callable[..., list[int]]
) -> None:
    judge(figures, check(models, LONG))


def judge(figures: Figures, codes: list[int]) -> None:
    figures.add(experiment="damaged models", store="-", faults=len(codes))
    assert 2 in codes
