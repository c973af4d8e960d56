"""Damaged job files and tables lead to one sentence or a run, never to a traceback or a stray file."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from chaos.figures import Figures
from chaos.sandbox import Sandbox, fuzz

SHORT, LONG = 10, 1000

WORDS = st.sampled_from(
    ["", "x", "../../up", "/etc/passwd", "a\0b", "\ud7ff\u202e", "%2e%2e/", "~/x", "s3://", "nan", "{date}"]
)
NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 15, 16, 17, 32, 2**31, 2**63, 10**30, -0.5, 0.5, 1e-300, 1e300])
ODD = st.sampled_from([float("nan"), float("inf"), True, False, None, [], {}, [[]], {"a": {"b": 1}}, "2026-11-23"])
VALUES = WORDS | NUMBERS | ODD | st.lists(WORDS | NUMBERS, max_size=3) | st.text(max_size=20)
# All keys except addresses, which may name any place; no other key may lead to files outside of the output.
KEYS = {
    "prompts": ["columns", "passthrough", "limit", "allow_http", "storage_options", "x"],
    "output": ["format", "image", "shard_size", "storage_options", "x"],
    "model": ["dtype", "quantization", "step_cache", "compile", "loras", "refresh", "storage_options"],
    "sampling": [
        *("width", "height", "num_inference_steps", "embedded_guidance", "cfg_scale", "negative_prompt", "seed"),
        *("t5_sequence_length", "input_image", "denoising_strength", "sigma_shift", "tiled", "num_images_per_prompt"),
    ],
    "workers": ["min", "max", "num_gpus", "num_cpus", "batch_size"],
    "failures": ["max_ratio", "max_attempts", "hang_s", "load_hang_s", "drain_s", "lease_ttl_s"],
    "name": [],
}
SECTIONS = st.fixed_dictionaries(
    {},
    optional={name: st.dictionaries(st.sampled_from(keys), VALUES, max_size=2) for name, keys in KEYS.items() if keys},
)

TEXTS = st.text(max_size=30) | st.sampled_from(["", " ", "x" * 5000, "a\0b", "<script>", "{}", "../../up", "\u202etxt"])
IDS = st.sampled_from(
    ["a", "a", "../../up", "/etc/passwd", "x" * 5000, "a\0b", "", ".", "..", "con", "a/b", "\n", "é", "e\u0301"]
)
CELLS: dict[str, st.SearchStrategy[Any]] = {
    "prompt": TEXTS | st.none(),
    "id": IDS | st.none(),
    "seed": st.integers(-(2**63), 2**63 - 1) | st.none(),
    "width": st.sampled_from([16, 32, 17, 0, -16, 10**9]) | st.none(),
    "height": st.sampled_from([16.0, 48.0, float("nan"), 1e300]) | st.none(),
    "num_inference_steps": st.sampled_from([1, 2, 0, -1, 10**9]),
    "embedded_guidance": st.floats(),
    "cfg_scale": st.sampled_from(["1", "x", ""]) | st.none(),
    "negative_prompt": TEXTS | st.none(),
    "num_images_per_prompt": st.sampled_from([1, 2, 0, -1, 2**40]),
    "input_image": st.sampled_from(["up.png", "../../up", "/etc/passwd", "http://127.0.0.1/", "file:///etc/passwd"])
    | st.none(),
    "denoising_strength": st.floats(0, 1) | st.none(),
    "lora": st.sampled_from(["../../up", "missing", "x"]) | st.none(),
    "lora_scale": st.floats() | st.none(),
    "odd": st.lists(st.integers(0, 9), max_size=2),
}


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    box = Sandbox(tmp_path, monkeypatch)
    pq.write_table(pa.table({"prompt": [f"image {number}" for number in range(5)]}), tmp_path / "prompts.parquet")
    return box


def base(sandbox: Sandbox) -> dict[str, Any]:
    return {
        "prompts": {"uri": str(sandbox.folder / "prompts.parquet")},
        "output": {"uri": str(sandbox.output), "shard_size": 2},
        "model": {"uri": "demo"},
        "sampling": {"width": 16, "height": 16, "num_inference_steps": 2},
    }


def write(sandbox: Sandbox, tree: dict[str, Any] | bytes) -> str:
    path = sandbox.folder / "job.yaml"
    path.write_bytes(tree if isinstance(tree, bytes) else yaml.safe_dump(tree, allow_unicode=True).encode())
    return str(path)


def check_settings(sandbox: Sandbox, figures: Figures, count: int) -> None:
    codes: list[int] = []

    @fuzz(count)
    @given(SECTIONS)
    def check(sections: dict[str, dict[str, Any]]) -> None:
        tree = base(sandbox)
        for name, values in sections.items():
            tree[name] = tree.get(name, {}) | values
        codes.append(sandbox.flux_batch("run", write(sandbox, tree)).code)

    check()
    figures.add(experiment="job files with wrong settings", store="-", faults=len(codes))
    assert {0, 2} <= set(codes)


def check_bytes(sandbox: Sandbox, figures: Figures, count: int) -> None:
    whole = yaml.safe_dump(base(sandbox)).encode()
    codes: list[int] = []

    @fuzz(count)
    @given(
        st.integers(0, len(whole)),
        st.integers(0, 8),
        st.binary(max_size=8)
        | st.sampled_from([b"&a [*a]", b"!!python/name:os.system", b"\xff\xfe", b"{{", b"\t", b": "]),
    )
    def check(place: int, length: int, instead: bytes) -> None:
        changed = whole[:place] + instead + whole[place + length :]
        output, prompts = uri_of(changed, "output"), uri_of(changed, "prompts")
        # Skip files that name another output, or that would read other files of this disk.
        if output in (None, str(sandbox.output)) and not is_elsewhere(prompts, sandbox.folder):
            codes.append(sandbox.flux_batch("run", write(sandbox, changed)).code)

    check()
    figures.add(experiment="damaged job files", store="-", faults=len(codes))
    assert {0, 2} <= set(codes)


def is_elsewhere(uri: str | None, folder: Path) -> bool:
    """Return whether an address names existing files, or a glob, outside of a folder."""
    return uri is not None and not uri.startswith(str(folder)) and (Path(uri).exists() or not {*"*?["}.isdisjoint(uri))


def uri_of(job: bytes, section: str) -> str | None:
    """Return the address of output or prompts in a job file, None if it has no readable one."""
    try:
        tree = yaml.safe_load(job.decode())
        return str(tree[section]["uri"])
    except (yaml.YAMLError, ValueError, TypeError, KeyError, RecursionError):
        return None


def check_rows(sandbox: Sandbox, figures: Figures, count: int) -> None:
    codes: list[int] = []

    @fuzz(count)
    @given(
        st.data(),
        st.sets(st.sampled_from(sorted(CELLS)), max_size=5),
        st.sampled_from(["webdataset", "files", "parquet"]),
    )
    def check(data: st.DataObject, columns: set[str], layout: str) -> None:
        names = sorted(columns | {"prompt"})
        table = {name: data.draw(st.lists(CELLS[name], min_size=4, max_size=4), label=name) for name in names}
        pq.write_table(pa.table(table), sandbox.folder / "prompts.parquet")
        tree = base(sandbox) | {"failures": {"max_ratio": 1.0}}
        tree["output"]["format"] = layout
        codes.append(sandbox.flux_batch("run", write(sandbox, tree)).code)

    check()
    figures.add(experiment="tables with odd rows", store="-", faults=4 * len(codes))
    assert 0 in codes


def check_tables(sandbox: Sandbox, figures: Figures, count: int) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["a", "b", "c"], "id": ["1", "2", "3"]}), buffer)
    whole = buffer.getvalue()
    codes: list[int] = []

    @fuzz(count)
    @given(st.integers(0, len(whole)), st.integers(0, 40), st.binary(max_size=40))
    def check(place: int, length: int, instead: bytes) -> None:
        (sandbox.folder / "prompts.parquet").write_bytes(whole[:place] + instead + whole[place + length :])
        codes.append(sandbox.flux_batch("run", write(sandbox, base(sandbox))).code)

    check()
    figures.add(experiment="damaged tables", store="-", faults=len(codes))
    assert {0, 2} <= set(codes)


CHECKS = [check_settings, check_bytes, check_rows, check_tables]


@pytest.mark.parametrize("check", CHECKS)
def test_hostile_input_is_refused_or_done(sandbox: Sandbox, figures: Figures, check: Callable[..., None]) -> None:
    check(sandbox, figures, SHORT)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("check", CHECKS)
def test_much_hostile_input_is_refused_or_done(sandbox: Sandbox, figures: Figures, check: Callable[..., None]) -> None:
    check(sandbox, figures, LONG)
