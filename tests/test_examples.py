"""Runs each example in a docstring, in a folder with prompts and a finished run."""

from __future__ import annotations

import ast
import doctest
import re
import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest

from flux_batch.engine.local import LocalEngine
from flux_batch.job import run
from helpers.fakes import make_fake_pipeline
from helpers.job_files import make_job
from helpers.reference import PACKAGE, public_modules

# Indented lines of a docstring after an empty line.
_BLOCK = re.compile(r"(?<=\n\n)(?: {4}[^\n]*\n(?:\n(?= {4}))*)+")


class Example(NamedTuple):
    """The code in one docstring: `blocks` are its indented blocks; `text` has the lines with >>>."""

    module: str
    name: str
    blocks: list[str]
    text: str


def is_code(block: str) -> bool:
    """Return whether a block is Python code with an effect, not a table or a tree of files."""
    try:
        nodes = list(ast.walk(ast.parse(block)))
    except SyntaxError:
        return False
    return any(isinstance(node, ast.Assign | ast.Call | ast.Import | ast.ImportFrom | ast.ClassDef) for node in nodes)


def examples() -> Iterator[Example]:
    for module in public_modules():
        path = PACKAGE.parent / module.replace(".", "/")
        tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
        for node in documented(tree):
            text = ast.get_docstring(node) or ""
            blocks = [block for each in _BLOCK.findall(f"{text}\n") if is_code(block := textwrap.dedent(each))]
            if blocks or ">>>" in text:
                yield Example(module, getattr(node, "name", ""), blocks, text)


def documented(
    node: ast.Module | ast.ClassDef | ast.FunctionDef,
) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef]:
    """Yield a node and all in it that may have a docstring; none is within an expression."""
    yield node
    for each in node.body:
        if isinstance(each, ast.ClassDef | ast.FunctionDef):
            yield from documented(each)


EXAMPLES = list(examples())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prompts.csv, and with a finished run in out/done."""
    made = tmp_path_factory.mktemp("examples")
    (made / "prompts.csv").write_text("prompt\na red star\na blue circle\n")
    config = make_job(made, output={"uri": str(made / "out/done")})
    run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline)
    return made


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: f"{example.module}.{example.name}".strip("."))
def test_an_example_does_what_it_says(folder: Path, monkeypatch: pytest.MonkeyPatch, example: Example) -> None:
    monkeypatch.chdir(folder)
    names = dict(vars(import_module(example.module)))
    for block in example.blocks:
        exec(block, names)
    said: list[str] = []
    case = doctest.DocTestParser().get_doctest(example.text, names, example.name, None, None)
    assert doctest.DocTestRunner().run(case, out=said.append).failed == 0, "".join(said)


def test_the_interface_has_examples() -> None:
    names = {example.name for example in EXAMPLES}
    assert {"", "FluxMapper", "Annotator", "OwnPipeline", "annotate", "select", "export", "verify"} <= names
