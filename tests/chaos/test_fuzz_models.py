"""Models as a broken download, a wrong converter or a stranger leaves them: a sentence, or pictures; never a traceback.

The same examples every time, as in test_fuzz_jobs.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import strategies as st

from chaos.sandbox import Sandbox
from layout_files import write_gguf
from tiny_flux import make_tiny_repository, read_folder

SHORT, LONG = 20, 1500

TRANSFORMER = "flux1-tiny.safetensors"
VALUES = st.sampled_from(
    [0, 1, -1, 3, 2**31, 10**12, 0.5, 1e300, True, None, "", "../../up", "x" * 5000, [], [0], [10**9] * 3, {}, {"a": 1}]
)
ENTRIES: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F64", "F32", "F16", "BF16", "I8", "U8", "BOOL", "F8_E4M3", "C64", "", "x", 1]),
        "shape": st.lists(st.sampled_from([0, 1, 24, 32, 64, -1, 2**31, 2**63]), max_size=5),
        "data_offsets": st.lists(st.sampled_from([0, 1, 4096, -1, 2**40, 2**63]), max_size=3),
    },
)
NOISE = st.binary(max_size=40)


class Models:
    """A small model that is whole, and the sandbox in which damaged copies of it are run."""

    def __init__(self, sandbox: Sandbox, whole: Path) -> None:
        self.sandbox = sandbox
        self.whole = whole
        self.copy = sandbox.folder / "model"
        self.files = sorted(str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file())

    def run(self, name: str, data: bytes) -> int:
        """Run a job on the model with one file replaced. Returns: the exit code."""
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.whole, self.copy)
        (self.copy / name).write_bytes(data)
        return self.sandbox.flux_batch("run", str(self.sandbox.folder / "job.yaml")).code


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_repository(tmp_path_factory.mktemp("original"), layout="original")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory, original: Path) -> Path:
    folder = tmp_path_factory.mktemp("gguf") / "model"
    shutil.copytree(original, folder)
    write_gguf(read_folder(folder)["transformer"], folder, "F16")
    return folder


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, original: Path) -> Models:
    sandbox = Sandbox(tmp_path, monkeypatch)
    sandbox.use(None)
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "prompts.parquet")
    tree = {
        "prompts": {"uri": str(tmp_path / "prompts.parquet")},
        "output": {"uri": str(sandbox.output)},
        "model": {"uri": str(tmp_path / "model"), "dtype": "float32"},
        "sampling": {"width": 16, "height": 16, "num_inference_steps": 1},
        "workers": {"num_gpus": 0},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tree))
    return Models(sandbox, original)
