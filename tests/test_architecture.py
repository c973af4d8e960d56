"""The house, checked from its source: who imports whom, where each third-party package lives, how large a file gets."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flux_batch"

BOTTOM = {"errors", "records", "redaction"}
PARTS_OF_WORKER = {"batch_maker", "batch_size", "batches", "image_pipeline", "lora_switch"}
PARTS_OF_WORKER |= {"pulse", "recorder", "shared_compile_cache", "shard_run", "tally"}
# Each unit of the package, and what it may import of the others. Only downwards: the order is that of the house.
LADDER: dict[str, set[str]] = {
    "redaction": set(),
    "errors": {"redaction"},
    "records": {"errors"},
    "rgb": {"errors"},
    "tally": set(),
    "log_lines": {"redaction"},
    "job_text": BOTTOM,
    "config_errors": BOTTOM | {"job_text"},
    "config": BOTTOM | {"job_text", "config_errors"},
    "model": set(),
    "storage": BOTTOM | {"config", "rgb"},
    "demo": {"model"},
    # The one unit that knows both what a model consists of and how bytes travel.
    "model_source": BOTTOM | {"model", "demo", "storage"},
    "model_errors": BOTTOM,
    "loras": BOTTOM | {"model", "model_errors", "model_source"},
    "model_manager": BOTTOM | {"model", "loras", "model_errors", "model_source"},
    "pixels": BOTTOM | {"rgb"},
    "picture_request": BOTTOM | {"model"},
    "pipeline": BOTTOM
    | {"model", "loras", "model_errors", "model_manager", "model_source", "picture_request", "pixels"},
    "plan": BOTTOM | {"config", "storage"},
    "batches": BOTTOM,
    "lora_switch": BOTTOM,
    "pulse": set(),
    "heap": set(),
    "image_pipeline": {"storage"},
    "batch_size": BOTTOM | {"config", "storage", "image_pipeline"},
    "shared_compile_cache": BOTTOM | {"storage", "image_pipeline"},
    "batch_maker": BOTTOM | {"storage", "batches", "image_pipeline", "lora_switch"},
    "recorder": BOTTOM | {"config", "storage", "batches"},
    "shard_run": BOTTOM | {"config", "storage", "batches", "batch_maker", "recorder"},
    "worker": BOTTOM | PARTS_OF_WORKER | {"config", "storage"},
    "engine": BOTTOM | {"tally"},
    "report": BOTTOM | {"config", "storage", "plan", "model", "model_source"},
    "pipeline_loader": {"config", "heap", "image_pipeline", "pipeline"},
    # A worker without shards: the same parts, in somebody's data pipeline.
    "stage": BOTTOM
    | {"config", "storage", "batch_maker", "batches", "image_pipeline", "lora_switch", "pipeline_loader", "recorder"},
    "job": BOTTOM
    | {"config", "job_text", "plan", "worker", "image_pipeline", "engine", "report", "storage", "pipeline_loader"}
    | {"demo", "model_source"},
    "bench": BOTTOM
    | {"config", "demo", "engine", "image_pipeline", "job", "job_text", "loras", "model", "model_manager", "pipeline"}
    | {"pipeline_loader", "plan", "report", "storage"},
    "cli": BOTTOM
    | {"bench", "config", "engine", "job", "job_text", "log_lines", "model_source", "plan", "report", "storage"},
    "__init__": {"config", "job", "model_manager", "model_source", "pipeline", "stage"},
    "__main__": {"cli"},
    # Programs of their own, `python -m flux_batch.demo.train` and `.score`: they stand above what they make and judge.
    "demo/train": BOTTOM | {"model", "demo", "model_manager"},
    "demo/score": BOTTOM | {"demo", "pipeline"},
}
PROGRAMS = ("demo/train", "demo/score")
STORAGE = ("storage/",)
MODEL = ("model/", "model_errors.py", "loras.py", "model_manager.py", "pipeline.py", "pixels.py", "demo/")
HOMES: dict[str, tuple[str, ...]] = {
    "ray": ("engine/ray_", "bench/ray_data.py"),
    "torch": (*MODEL, "bench/"),
    "einops": ("model/",),
    "safetensors": MODEL,
    "gguf": ("model/gguf_file.py", "model/dequantize.py"),
    "transformers": ("model/", "demo/", "bench/random_model.py"),
    "tokenizers": ("model/", "demo/"),
    "sentencepiece": ("model/", "demo/"),
    "filelock": ("storage/cache.py",),
    # The hub's client gives listings, tokens and errors; bytes travel through fsspec, which goes on where it stopped.
    "huggingface_hub": ("model/hub.py", "model_source.py"),
    "tqdm": ("storage/transfer.py",),
    "fsspec": STORAGE,
    "s3fs": STORAGE,
    "aiohttp": STORAGE,
    "tenacity": ("storage/patience.py",),
    "pyarrow": ("storage/", "plan.py", "worker.py", "stage.py", "demo/", "bench/planning.py", "bench/job.py"),
    "PIL": (
        "storage/",
        "rgb.py",
        "pixels.py",
        "pipeline.py",
        "picture_request.py",
        "demo/",
        "report/gallery_",
        "bench/encode.py",
    ),
    "numpy": ("storage/", "rgb.py", "model/", "pixels.py", "demo/", "report/gallery_", "bench/"),
    # What is measured beside ours; no need of a run.
    "diffusers": ("bench/peer.py",),
    "cv2": ("bench/encode.py",),
    "pydantic": ("config.py", "config_errors.py"),
    "pydantic_core": ("config_errors.py",),
    "yaml": ("config.py", "job_text.py", "cli.py"),
}
# A file that does not fit into the head is two; the composition roots are where it starts.
MAX_LINES = 400


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the full name and the line of everything a file imports, at whatever depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            if node.module == "flux_batch":
                for alias in node.names:
                    yield f"flux_batch.{alias.name}", node.lineno
            else:
                yield str(node.module), node.lineno


def unit_of(path: str) -> str:
    """Return the unit a file or module belongs to: the first part of its path, but for the programs."""
    path = path.removesuffix(".py")
    return next((program for program in PROGRAMS if f"{path}/".startswith(f"{program}/")), path.split("/")[0])


def violations(root: Path = PACKAGE) -> list[str]:
    """List what breaks the ladder or leaves its home."""
    found = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        unit = unit_of(name)
        for module, line in imports(path):
            top, _, rest = module.partition(".")
            target = unit_of(rest.replace(".", "/"))
            if top == "flux_batch" and target != unit and target not in LADDER.get(unit, set()):
                found.append(f"{name}:{line}: {unit} imports {target or 'the package'}")
            elif top == "flux_batch" or top in sys.stdlib_module_names:
                continue
            elif not name.startswith(HOMES.get(top, ())):
                found.append(f"{name}:{line}: {top} belongs into {', '.join(HOMES.get(top, ())) or 'no file yet'}")
    return found


def test_imports_only_go_down_and_packages_stay_at_home() -> None:
    assert violations() == []


@pytest.mark.parametrize(
    ("file", "line", "words"),
    [
        ("storage/x.py", "from flux_batch.worker import Worker", "storage imports worker"),
        ("storage/x.py", "import torch", "torch belongs into model/"),
        ("engine/local.py", "import ray", "ray belongs into engine/ray_"),
        ("engine/x.py", "def f():\n    from flux_batch.storage import store", "engine imports storage"),
        ("errors.py", "from flux_batch import records", "errors imports records"),
        ("config.py", "import flux_batch", "config imports the package"),
        ("model/x.py", "from flux_batch.errors import FluxBatchError", "model imports errors"),
        ("newcomer.py", "from flux_batch.errors import FluxBatchError", "newcomer imports errors"),
        ("worker.py", "import requests", "requests belongs into no file yet"),
    ],
)
def test_the_rules_can_be_broken(tmp_path: Path, file: str, line: str, words: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line)

    (found,) = violations(tmp_path)
    assert words in found


def test_the_ladder_has_no_cycle() -> None:
    below: set[str] = set()
    waiting = dict(LADDER)
    while ready := [unit for unit, uses in waiting.items() if uses <= below]:
        below |= set(ready)
        waiting = {unit: uses for unit, uses in waiting.items() if unit not in below}
    assert waiting == {}


def test_nothing_prints_but_the_command_line() -> None:
    calls = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in sources()
        if unit_of(path.relative_to(PACKAGE).as_posix()) not in PROGRAMS
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "pprint")
    ]
    assert calls == []


def test_every_file_says_what_it_is_and_fits_into_the_head() -> None:
    for path in sources():
        text = path.read_text()
        assert ast.get_docstring(ast.parse(text)), f"{path.name} has no docstring"
        assert len(text.splitlines()) <= MAX_LINES, f"{path.name} is too long"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("flux_batch", ["torch", "ray", "pyarrow", "fsspec", "pydantic", "numpy"]),
        ("flux_batch.cli", ["torch", "ray", "transformers"]),
        ("flux_batch.config", ["torch", "ray", "pyarrow", "fsspec"]),
        ("flux_batch.job", ["torch", "ray", "transformers"]),
        ("flux_batch.bench.command", ["torch", "ray", "numpy", "pyarrow", "pydantic", "diffusers"]),
        ("flux_batch.worker", ["torch", "ray", "transformers"]),
        ("flux_batch.stage", ["torch", "ray", "transformers"]),
        ("flux_batch.model_source", ["torch", "ray", "transformers", "huggingface_hub", "pyarrow"]),
        ("flux_batch.storage.commits", ["torch", "ray"]),
        ("flux_batch.engine.protocol", ["torch", "ray", "pyarrow"]),
        ("flux_batch.model.params", ["ray", "pyarrow", "fsspec"]),
    ],
)
def test_an_import_pulls_in_only_what_it_needs(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}; print([name for name in {absent} if name in sys.modules])"

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "[]"
