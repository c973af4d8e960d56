"""Checks of the source: imports between folders, the home of third-party packages, the size of files."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flux_batch"

BOTTOM = {"errors", "records", "redaction", "sampling_params"}
# Each unit of the package, a folder or a file at its top, and the units it may import. Imports only go down.
LADDER: dict[str, set[str]] = {
    "redaction": set(),
    "errors": {"redaction"},
    "sampling_params": {"errors"},
    "records": {"sampling_params"},
    "telemetry": set(),
    "logs": {"redaction"},
    "config": BOTTOM,
    "images": BOTTOM | {"config"},
    "model": set(),
    "storage": BOTTOM,
    "demo": set(),
    # `demo` is also the address of the packaged model, which needs no download: only its path is used.
    "download": BOTTOM | {"demo", "model", "storage", "telemetry"},
    "prompts": BOTTOM | {"config", "images", "storage"},
    "output": BOTTOM | {"config", "images", "storage"},
    "pipeline": BOTTOM | {"config", "download", "images", "model"},
    # The names of shards come from the output, and the memory of a run is estimated from its model.
    "plan": BOTTOM | {"config", "download", "model", "output", "prompts"},
    "engine": BOTTOM | {"logs", "telemetry"},
    "worker": BOTTOM | {"config", "images", "output", "prompts", "storage", "telemetry"},
    "report": BOTTOM | {"config", "images", "output", "plan", "storage", "telemetry"},
    # A worker without shards: the same parts in a user's data pipeline.
    "mapper": BOTTOM | {"config", "dataset/annotators", "images", "output", "pipeline", "prompts", "worker"},
    # Reads the run in an output; `worker` for the choices of the first worker, such as its dtype.
    "resume": BOTTOM | {"config", "download", "output", "plan", "prompts", "report", "storage", "worker"},
    "job": BOTTOM
    | {"config", "dataset/annotators", "demo", "download", "engine", "output", "pipeline", "plan", "prompts"}
    | {"report", "resume", "storage", "telemetry", "worker"},
    # The packaged annotators, which a job may also use as scores.
    "dataset/annotators": BOTTOM | {"config", "demo", "download", "images", "pipeline"},
    "dataset": BOTTOM
    | {"config", "dataset/annotators", "engine", "images", "output", "plan", "report", "storage", "telemetry"},
    "bench": BOTTOM
    | {
        "config",
        "demo",
        "download",
        "engine",
        "images",
        "job",
        "model",
        "output",
        "pipeline",
        "plan",
        "prompts",
        "report",
        "storage",
        "telemetry",
        "worker",
    },
    "arguments": {"bench", "dataset", "errors"},
    "cli": BOTTOM
    | {
        "arguments",
        "bench",
        "config",
        "dataset",
        "demo",
        "download",
        "engine",
        "job",
        "logs",
        "output",
        "plan",
        "report",
        "storage",
    },
    "__init__": {"config", "download", "job", "mapper", "pipeline"},
    "__main__": {"cli"},
    # Separate programs, such as `python -m flux_batch.demo.train`, which use the parts that they train and judge.
    "demo/train": BOTTOM | {"demo", "model", "pipeline"},
    "demo/score": BOTTOM | {"demo", "pipeline"},
    "demo/score_conditions": BOTTOM | {"demo", "pipeline"},
}
PROGRAMS = ("demo/train", "demo/score", "demo/score_conditions")
# Folders within a folder that have their own entry in the ladder.
PARTS = (*PROGRAMS, "dataset/annotators")
TENSORS = ("model/", "pipeline/", "demo/", "bench/", "dataset/annotators/")
HOMES: dict[str, tuple[str, ...]] = {
    "ray": ("engine/ray_", "bench/ray_data.py"),
    "torch": TENSORS,
    "einops": ("model/",),
    "safetensors": TENSORS,
    "gguf": ("model/checkpoint/gguf_",),
    "transformers": ("model/", "demo/", "bench/pipeline/", "dataset/annotators/"),
    "tokenizers": ("model/", "demo/"),
    "sentencepiece": ("model/", "demo/"),
    "filelock": ("download/", "storage/scratch.py"),
    # Downloads into its cache, which other programs share; our own transfer downloads into a user's folder.
    "huggingface_hub": ("download/", "dataset/publish/hub.py", "dataset/publish/publish.py"),
    "tqdm": ("download/transfer.py",),
    "fsspec": ("storage/", "prompts/", "download/"),
    "s3fs": ("storage/",),
    "aiohttp": ("storage/",),
    "tenacity": ("storage/retry.py", "engine/backoff.py"),
    "pyarrow": ("storage/", "dataset/", "prompts/", "plan/", "worker/", "output/", "mapper.py", "demo/", "bench/"),
    "duckdb": ("dataset/",),
    "lance": ("dataset/export/lance.py",),
    "c2pa": ("dataset/export/signature.py",),
    "cryptography": ("dataset/export/signature.py",),
    "rich": ("report/progress/",),
    "shtab": ("arguments.py",),
    "jinja2": ("report/template.py", "prompts/template.py"),
    "PIL": ("images.py", "prompts/", "pipeline/", "dataset/", "report/gallery/", "demo/", "bench/"),
    "numpy": ("images.py", "dataset/", "mapper.py", "report/gallery/", *TENSORS),
    # Used in benchmarks for comparison; no run needs them.
    "diffusers": ("bench/pipeline/peer.py",),
    "cv2": ("bench/encode.py",),
    "pydantic": ("config/",),
    "pydantic_core": ("config/",),
    "yaml": ("config/",),
}
# A longer file is too large to understand and must be split; files that compose all others grow first.
MAX_LINES = 500
# The most entries of a folder, without the demo's data and Python's caches.
MAX_AT_TOP, MAX_IN_FOLDER = 28, 13
DATA = {"__pycache__", "flux-demo"}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    return list(ast.walk(parsed(path)))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the full name and the line of every import of a file, also within functions."""
    for node in nodes_of(path):
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
    """Return the unit of a file or module: the first part of its path, or a longer one in PARTS."""
    path = path.removesuffix(".py")
    return next((part for part in PARTS if f"{path}/".startswith(f"{part}/")), path.split("/")[0])


def violations(root: Path = PACKAGE) -> list[str]:
    """List the imports that break the ladder or leave the home of a package."""
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
        ("storage/x.py", "from flux_batch.worker.worker import Worker", "storage imports worker"),
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


def test_the_ladder_has_a_rung_for_every_unit_and_no_other() -> None:
    units = {unit_of(path.relative_to(PACKAGE).as_posix()) for path in sources()}
    assert units == set(LADDER)


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
        for node in nodes_of(path)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "pprint")
    ]
    assert calls == []


def test_every_file_says_what_it_is_and_fits_into_the_head() -> None:
    for path in sources():
        text = path.read_text()
        assert ast.get_docstring(parsed(path)), f"{path.name} has no docstring"
        assert len(text.splitlines()) <= MAX_LINES, f"{path.name} is too long"


def test_every_listing_fits_into_the_head() -> None:
    for folder in {path.parent for path in sources()}:
        entries = sorted(path.name for path in folder.iterdir() if path.is_dir() or path.suffix == ".py")
        entries = [name for name in entries if name not in DATA]
        assert len(entries) <= (MAX_AT_TOP if folder == PACKAGE else MAX_IN_FOLDER), f"{folder}: {entries}"


# Names that need no underscore although only one file uses them: of logging, of typing, and of programs, whose
# `parse_arguments` the test of the pages calls.
CONVENTIONAL = {"log", "T", "parse_arguments"}


def module_of(path: Path, root: Path) -> str:
    """Return the module name of a file."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def top_level_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield the functions, classes and constants that a file defines, with their lines."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in (each for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)):
                yield name.id, node.lineno


def dotted(node: ast.expr) -> str:
    """Return an expression such as `a.b.c` as text, empty for any other expression."""
    if isinstance(node, ast.Attribute) and (before := dotted(node.value)):
        return f"{before}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def uses(path: Path, modules: set[str]) -> set[tuple[str, str]]:
    """Return the (module, name) pairs of the package that a file imports, reads from a module, or names in a string."""
    found: set[tuple[str, str]] = set()
    imported: dict[str, str] = {}  # local name -> module
    nodes = nodes_of(path)
    strings = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in modules:
                    imported[alias.asname or alias.name] = full
                else:
                    found.add((str(node.module), alias.name))
        elif isinstance(node, ast.Import):
            imported |= {alias.asname or alias.name: alias.name for alias in node.names if alias.name in modules}
    for node in nodes:
        if isinstance(node, ast.Attribute) and (module := imported.get(dotted(node.value))):
            found.add((module, node.attr))
    for text in strings:
        if text.isidentifier():  # as in monkeypatch.setattr(module, "NAME", ...)
            found |= {(module, text) for module in imported.values()}
        module, _, name = text.replace(":", ".").rpartition(".")
        if name.isidentifier():
            found.add((module, name))
    return found


def misnamed(root: Path = ROOT) -> list[str]:
    """List names with an underscore that other files use, and names without one that no other file uses."""
    folders = ("flux_batch", "tests", "jobs", "cluster")
    paths = [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]
    modules = {module_of(path, root): path for path in paths if path.is_relative_to(root / "flux_batch")}
    users: dict[tuple[str, str], set[Path]] = {}
    names = set(modules)
    for path in paths:
        for use in uses(path, names):
            users.setdefault(use, set()).add(path)
    found = []
    for module, path in modules.items():
        for name, line in top_level_names(parsed(path)):
            if name.startswith("__") or name in CONVENTIONAL:
                continue
            others = sorted(users.get((module, name), set()) - {path})
            where = f"{path.relative_to(root)}:{line}: {name}"
            if name.startswith("_") and others:
                found.append(f"{where} is private, but {others[0].relative_to(root)} uses it")
            elif not name.startswith("_") and not others:
                found.append(f"{where} is used in its own file only: it begins with an underscore")
    return found


def test_an_underscore_means_used_in_this_file_only() -> None:
    assert misnamed() == []


@pytest.mark.parametrize(
    ("test", "found"),
    [
        ("from flux_batch.x import LIMIT, make", []),
        ("from flux_batch import x\nx.LIMIT, x.make", []),
        ("import flux_batch.x\nflux_batch.x.make(LIMIT='flux_batch.x.LIMIT')", []),
        ("from flux_batch import x\npatch(x, 'LIMIT', 3)\npatch('flux_batch.x.make')", []),
        ("from flux_batch.x import make", ["flux_batch/x.py:1: LIMIT is used in its own file only"]),
        ("from flux_batch.x import LIMIT, make, _help", ["flux_batch/x.py:3: _help is private, but tests"]),
    ],
)
def test_names_are_told_apart_by_who_uses_them(tmp_path: Path, test: str, found: list[str]) -> None:
    module = "LIMIT: int = 2\ndef make(): ...\ndef _help(): ..."
    for name, text in (("flux_batch/x.py", module), ("tests/test_x.py", test)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)

    assert [line[: len(start)] for line, start in zip(misnamed(tmp_path), found, strict=True)] == found


# A docstring begins with a verb such as Return, or with a noun phrase, but not with one of these words.
RIDDLES = {"Of", "What", "Which", "How", "Where", "Whether", "That"}
RIDDLES |= {"Tell", "Give", "Say", "Name", "Let", "Have", "Lay"}
MAX_FIRST_SENTENCE_WORDS = 15


def riddles(root: Path = PACKAGE) -> Iterator[str]:
    """Yield the docstrings that begin with a word of RIDDLES, or whose first sentence is long."""
    for path in sorted(root.rglob("*.py")):
        for node in nodes_of(path):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) or not ast.get_docstring(node):
                continue
            first = re.split(r"(?<=[.!?:;])\s|\n\n", str(ast.get_docstring(node)))[0]
            if first.split()[0] in RIDDLES or len(first.split()) > MAX_FIRST_SENTENCE_WORDS:
                yield f"{path.relative_to(root)}:{getattr(node, 'lineno', 1)}: {first}"


def test_docstrings_are_sentences() -> None:
    assert list(riddles()) == []


@pytest.mark.parametrize(
    ("docstring", "is_riddle"),
    [("Return it.", False), ("What it is.", True), ("Whether it is.", True), ("Read " + 14 * "very " + "much.", True)],
)
def test_riddles_are_found(tmp_path: Path, docstring: str, is_riddle: bool) -> None:
    (tmp_path / "x.py").write_text(f'def f():\n    """{docstring}"""\n')
    assert bool(list(riddles(tmp_path))) == is_riddle


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("flux_batch", ["torch", "ray", "pyarrow", "fsspec", "pydantic", "numpy"]),
        ("flux_batch.cli", ["torch", "ray", "transformers"]),
        ("flux_batch.config.schema", ["torch", "ray", "pyarrow", "fsspec"]),
        ("flux_batch.job", ["torch", "ray", "transformers"]),
        ("flux_batch.bench.command", ["torch", "ray", "numpy", "pyarrow", "pydantic", "diffusers"]),
        ("flux_batch.worker.worker", ["torch", "ray", "transformers"]),
        ("flux_batch.plan.memory", ["torch", "ray", "transformers"]),
        ("flux_batch.plan.survey", ["torch", "ray", "transformers"]),
        ("flux_batch.mapper", ["torch", "ray", "transformers"]),
        ("flux_batch.download.models", ["torch", "ray", "transformers", "huggingface_hub", "pyarrow"]),
        ("flux_batch.output.commits", ["torch", "ray"]),
        ("flux_batch.engine.protocol", ["torch", "ray", "pyarrow"]),
        ("flux_batch.model.params", ["ray", "pyarrow", "fsspec"]),
    ],
)
def test_an_import_pulls_in_only_what_it_needs(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}; print([name for name in {absent} if name in sys.modules])"

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "[]"


def test_a_name_that_tests_of_a_gpu_replace_is_there() -> None:
    replaced = re.compile(r"setattr\(\s*\"(flux_batch[\w.]*)\.(\w+)\"")
    names = [match for path in (ROOT / "tests" / "gpu").glob("*.py") for match in replaced.findall(path.read_text())]

    assert names
    assert [f"{module}.{name}" for module, name in names if not hasattr(importlib.import_module(module), name)] == []
