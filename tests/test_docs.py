"""Checks each job file, command line, link, path and table of the pages, and that each check can fail."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import inspect
import json
import pkgutil
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pytest
import yaml
from pydantic import BaseModel, Field

import flux_batch.output.paths as run_paths
from flux_batch.arguments import parser
from flux_batch.config.schema import PROMPT_FIELDS, JobConfig
from flux_batch.dataset.annotators.load import BUILT_IN
from flux_batch.errors import JobError
from flux_batch.output.metadata import RECORD_SCHEMA
from flux_batch.report.summary import RunReport
from helpers import job_file_table

ROOT = Path(__file__).parents[1]
FOLDERS = ("flux_batch", "jobs", "cluster", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
MAX_README_LINES, MAX_SKILL_LINES = 180, 80
# Completes a fragment of a job file.
MINIMAL: dict[str, Any] = {"prompts": {"uri": "demo"}, "output": {"uri": "out"}, "model": {"uri": "demo"}}
LANGUAGES = {"sh", "yaml", "json", "python", "text"}
# Programs of others, whose command lines are not checked.
FOREIGN_PROGRAMS = {"export", "pip", "source"}
FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PATH = re.compile(rf"(?<![\w/.:-])(?:{'|'.join(FOLDERS)})/[\w./-]*")
SETTING = re.compile(rf"({'|'.join(JobConfig.model_fields)})((?:\.\w+)+)(?:: .*)?")


@dataclasses.dataclass(frozen=True)
class Page:
    """A parsed page in Markdown. `path` is the file from which relative links start."""

    text: str
    path: Path = ROOT / "README.md"

    @cached_property
    def blocks(self) -> list[tuple[str, str]]:
        """Language and text of each fenced block."""
        return [(found[1], found[2]) for found in FENCE.finditer(self.text)]

    @cached_property
    def prose(self) -> str:
        """The text without its blocks."""
        return FENCE.sub("", self.text)

    @cached_property
    def spans(self) -> list[str]:
        """The text of each code span."""
        return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", self.prose)]

    @cached_property
    def links(self) -> list[str]:
        """The target of each link and image."""
        return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]+`", "", self.prose))

    @cached_property
    def anchors(self) -> set[str]:
        """The name by which a link can reach each heading, as GitHub makes it."""
        titles = re.findall(r"^#+ (.+)$", self.prose, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}

    def of_language(self, language: str) -> list[str]:
        """Return the blocks in a language."""
        return [text for name, text in self.blocks if name == language]


def unknown_languages(page: Page) -> Iterator[str]:
    """Yield the languages of blocks that no check reads, since such a block could contain anything."""
    return (
        f"```{name}: must be one of {', '.join(sorted(LANGUAGES))}" for name, _ in page.blocks if name not in LANGUAGES
    )


def broken_jobs(page: Page) -> Iterator[str]:
    """Yield what is wrong with the job files of a page; a fragment is completed with a minimal job."""
    for text in page.of_language("yaml"):
        try:
            JobConfig.from_dict(completed(yaml.safe_load(text)), origin="yaml")
        except (JobError, yaml.YAMLError, AttributeError) as error:
            yield str(error)


def completed(fragment: Mapping[str, Any]) -> dict[str, Any]:
    """Return a job file: a fragment over the minimal job."""
    sections = {name: {**MINIMAL.get(name, {}), **section} for name, section in fragment.items() if is_section(section)}
    if "rows" in sections.get("prompts", {}):  # `rows` replaces `uri`
        del sections["prompts"]["uri"]
    return {**MINIMAL, **fragment, **sections}


def is_section(value: Any) -> bool:
    return isinstance(value, Mapping)


def broken_commands(page: Page) -> Iterator[str]:
    """Yield what is wrong with the command lines of a page, in blocks and in code spans."""
    for block in page.of_language("sh"):
        for line in block.replace("\\\n", " ").splitlines():
            yield from wrong_with_command(shlex.split(line, comments=True))
    for span in page.spans:
        if re.match(r"(flux-batch|make|python -m) ", span):
            yield from wrong_with_command(shlex.split(span), is_mention=True)


def wrong_with_command(words: list[str], *, is_mention: bool = False) -> Iterator[str]:
    """Yield what is wrong with a command line; a mention of a command of ours may leave out its arguments."""
    words = [*words]
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    match words:
        case [] | ["flux-batch"]:
            pass
        case ["flux-batch", name] if is_mention:
            if name not in commands():
                yield f"flux-batch {name}: no such command"
        case ["flux-batch", *arguments]:
            yield from wrong_with_arguments(arguments)
        case ["python", "jobs/generate.py", *arguments] | ["jobs/submit.sh", *arguments]:
            yield from wrong_with_arguments(["run", *arguments])
        case ["python", "-m", module, *arguments]:
            yield from wrong_with_program(module, arguments)
        case ["ray", "job", "submit", *options] if "--" in options:
            yield from wrong_with_command(options[options.index("--") + 1 :])
        case ["make", *targets]:
            known = re.findall(r"^([\w-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
            yield from (f"make {target}: no such target" for target in targets if target not in known)
        case [program, *_]:
            if program not in FOREIGN_PROGRAMS and not (ROOT / program).is_file():
                yield f"{program}: no program that is known"


def commands() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command of `flux-batch`, by its name."""
    (choices,) = [action.choices for action in parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(choices)


def wrong_with_arguments(arguments: list[str]) -> Iterator[str]:
    """Yield what is wrong with the arguments of `flux-batch`, the settings of --set included."""
    given = parsed(parser(), arguments)
    if isinstance(given, str):
        yield f"flux-batch {shlex.join(arguments)}: {given}"
        return
    try:
        JobConfig.from_yaml(yaml.safe_dump(MINIMAL), "--set", getattr(given, "overrides", []))
    except JobError as error:
        yield f"flux-batch {shlex.join(arguments)}: {error}"


def parsed(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace | str:
    """Parse a command line. Returns: the arguments, or the parser's error."""
    said: list[str] = []

    def refuse(self: argparse.ArgumentParser, message: str) -> None:
        said.append(message)
        raise SystemExit(2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(parser), "error", refuse)
        try:
            return parser.parse_args(arguments)
        except SystemExit:
            return "; ".join(said)


def wrong_with_program(module: str, arguments: list[str]) -> Iterator[str]:
    """Yield what is wrong with a command line of one of the package's own programs."""
    folder = ROOT / module.replace(".", "/")
    if not folder.with_suffix(".py").is_file() and not (folder / "__main__.py").is_file():
        yield f"python -m {module}: no such program"
        return
    program = importlib.import_module(f"{module}.__main__" if folder.is_dir() else module)
    made: list[argparse.ArgumentParser] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *arguments])
        patch.setattr(argparse.ArgumentParser, "error", lambda self, message: made.append(message))
        program.parse_arguments()
    yield from (f"python -m {module} {shlex.join(arguments)}: {message}" for message in made)


def broken_links(page: Page) -> Iterator[str]:
    """Yield the relative links without a file in the repository or a heading in a page."""
    for link in page.links:
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.path.parent / name if name else page.path
        if not target.exists():
            yield f"{link}: no such file"
        elif anchor:
            anchors = page.anchors if target == page.path else Page(target.read_text(), target).anchors
            if anchor not in anchors:
                yield f"{link}: no such heading"


def missing_paths(page: Page) -> Iterator[str]:
    """Yield the missing paths of the repository that a page names, in prose or blocks.

    NAME stands for a name that the reader chooses.
    """
    for path in PATH.findall(page.text):
        if "NAME" not in path and not (ROOT / path.rstrip(".")).exists():
            yield f"{path}: no such file or folder"


def unknown_settings(page: Page) -> Iterator[str]:
    """Yield the code spans that look like a key of the job file, such as `failures.max_ratio`, but are none."""
    for span in page.spans:
        if (found := SETTING.fullmatch(span)) and not has_key(JobConfig, [found[1], *found[2].strip(".").split(".")]):
            yield f"{span}: no such key of the job file"


def has_key(section: Any, keys: list[str]) -> bool:
    """Return whether a section of the job file has a key, given as the names on the way to it."""
    if not keys:
        return True
    if type(None) in get_args(section):  # an optional section
        section = get_args(section)[0]
    if not (isinstance(section, type) and issubclass(section, BaseModel)):
        return False
    field = section.model_fields.get(keys[0])
    return field is not None and has_key(field.annotation, keys[1:])


def broken_code(page: Page) -> Iterator[str]:
    """Yield what is wrong with the Python of a page: syntax, imports of flux_batch, arguments of the pipeline."""
    for text in page.of_language("python"):
        try:
            nodes = list(ast.walk(ast.parse(text)))
        except SyntaxError as error:
            yield str(error)
            continue
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("flux_batch"):
                module = importlib.import_module(str(node.module))
                yield from (
                    f"{alias.name}: cannot be imported" for alias in node.names if not hasattr(module, alias.name)
                )
            elif isinstance(node, ast.Call):
                yield from unknown_keywords(node)


def unknown_keywords(call: ast.Call) -> Iterator[str]:
    """Yield the unknown keyword arguments in a call of the pipeline or of `from_pretrained`."""
    from flux_batch import FluxImagePipeline

    name = ast.unparse(call.func)
    functions = {
        "FluxImagePipeline.from_pretrained": FluxImagePipeline.from_pretrained,
        "pipe": FluxImagePipeline.__call__,
    }
    if name in functions:
        known = inspect.signature(functions[name]).parameters
        yield from (f"{name}({word.arg}=...): no such argument" for word in call.keywords if word.arg not in known)


def broken_json(page: Page) -> Iterator[str]:
    """Yield what is wrong with the JSON of a page."""
    for text in page.of_language("json"):
        try:
            json.loads(text)
        except ValueError as error:
            yield str(error)


def unknown_annotations(page: Page) -> Iterator[str]:
    """Yield columns of built-in annotators, such as `exposure.is_blank`, that they do not write."""
    text = "\n".join([*page.spans, *(text for _, text in page.blocks)])
    for name, column in re.findall(rf"\b({'|'.join(BUILT_IN)})\.([a-z_]+)\b", text):
        if column not in {*annotation_columns()[name], "error_type", "error_message"}:
            yield f"{name}.{column}: no such column of an annotation"


def unmade_annotations(page: Page) -> Iterator[str]:
    """Yield the commands of a page that select images by columns which no command of the page writes."""
    lines = "\n".join(page.of_language("sh")).replace("\\\n", " ").splitlines()
    annotators = {name for line in lines for name in re.findall(r"--with ([a-z]+)\b", line)}
    for line in lines:
        used = " ".join(re.findall(r"--(?:where|by|within|dedup) (\S+|\"[^\"]*\")", line))
        for name, columns in annotation_columns().items():
            if name not in annotators and set(columns) & set(re.findall(r"\w+", used)):
                yield f"{line}: nothing on the page annotates {name}"


@cache
def annotation_columns() -> dict[str, list[str]]:
    """Return the columns of each built-in annotator, as their page names them."""
    rows = rows_of(ROOT / "flux_batch/dataset/README.md", "## Built-in annotators")
    return {name.strip("`"): re.findall(r"`(\w+)`", columns) for name, columns, _ in rows}


CHECKS: list[Callable[[Page], Iterator[str]]] = [
    unknown_languages,
    broken_jobs,
    broken_commands,
    broken_links,
    missing_paths,
    unknown_settings,
    broken_code,
    broken_json,
    unknown_annotations,
    unmade_annotations,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_page_says_is_so(path: Path, check: Callable[[Page], Iterator[str]]) -> None:
    assert list(check(Page(path.read_text(), path))) == []


@pytest.mark.parametrize(
    ("check", "text", "words"),
    [
        (unknown_languages, "```toml\na = 1\n```\n", "```toml: must be one of"),
        (unknown_languages, "```\nflux-batch nonsense\n```\n", "```: must be one of"),
        (broken_jobs, "```yaml\nsampling: {widht: 64}\n```\n", "did you mean 'width'?"),
        (broken_jobs, "```yaml\nmodel:\n  dtype: int8\n```\n", "model.dtype"),
        (broken_jobs, "```yaml\na: [\n```\n", "while parsing"),
        (broken_commands, "```sh\nflux-batch rum job.yaml\n```\n", "invalid choice: 'rum'"),
        (broken_commands, "```sh\nA=1 flux-batch run job.yaml \\\n    --sett a=1  # no\n```\n", "--sett"),
        (broken_commands, "```sh\nflux-batch run job.yaml --set sampling.widht=64\n```\n", "did you mean 'width'?"),
        (broken_commands, "```sh\nray job submit -- python jobs/generate.py\n```\n", "required: JOB.yaml"),
        (broken_commands, "```sh\npython -m flux_batch.demo.scores\n```\n", "no such program"),
        (broken_commands, "```sh\npython -m flux_batch.demo.score --modell demo\n```\n", "--modell"),
        (broken_commands, "```sh\nflux-bach run job.yaml\n```\n", "flux-bach: no program"),
        (broken_commands, "Run `make demos` first.", "make demos: no such target"),
        (broken_commands, "Use `flux-batch statuss`.", "flux-batch statuss: no such command"),
        (broken_commands, "Use `flux-batch\nstatus`, or `flux-batch status --jsonn OUTPUT_URI`.", "--jsonn"),
        (broken_links, "[here](jobs/demo.yml)", "jobs/demo.yml: no such file"),
        (broken_links, "![sheet](sheet.png)", "sheet.png: no such file"),
        (broken_links, "# Title\n[here](#titel)", "#titel: no such heading"),
        (broken_links, "[here](cluster/README.md#where-it-walks)", "no such heading"),
        (missing_paths, "see `flux_batch/nowhere.py`", "flux_batch/nowhere.py: no such file"),
        (missing_paths, "```text\ntests/nowhere/\n```\n", "tests/nowhere/: no such file"),
        (unknown_settings, "`failures.max_share`", "failures.max_share: no such key"),
        (unknown_settings, "`output.image.typ: png`", "output.image.typ: png: no such key"),
        (broken_code, "```python\nfor\n```\n", "invalid syntax"),
        (broken_code, "```python\nfrom flux_batch import FluxVideoPipeline\n```\n", "FluxVideoPipeline"),
        (broken_code, "```python\nimage = pipe(prompt='a', steps=3)\n```\n", "pipe(steps=...)"),
        (
            unknown_annotations,
            "```sh\nflux-batch select out good --by clip.similarity\n```\n",
            "clip.similarity: no such",
        ),
        (unmade_annotations, '```sh\nflux-batch select out good --where "sharpness > 1"\n```\n', "annotates sharpness"),
        (broken_json, "```json\n{a: 1}\n```\n", "Expecting property name"),
    ],
)
def test_each_check_can_fail(check: Callable[[Page], Iterator[str]], text: str, words: str) -> None:
    (found,) = check(Page(text))
    assert words in found


def test_what_is_right_passes_each_check() -> None:
    page = """
    # A page

    See [the job files](jobs/README.md), [above](#a-page), `flux-batch run` and `failures.max_ratio: 0.5`.
    """
    lines = [line.strip() for line in page.splitlines()]
    blocks = (
        "```yaml\nsampling: {width: 64}\n```\n```sh\nX=1 flux-batch run a.yaml --set sampling.width=64  # so\n```\n"
    )
    assert [found for check in CHECKS for found in check(Page("\n".join(lines) + blocks))] == []


def test_the_readme_is_a_landing_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES


def test_the_tables_of_keys_are_those_of_the_config() -> None:
    text = job_file_table.PAGE.read_text()
    assert f"{job_file_table.START}\n{job_file_table.tables()}\n{job_file_table.END}" in text, "run `make pages`"


class Lens(BaseModel):
    """A section of a job file, for the test below."""

    kind: str = "wide"
    """What it is | was."""
    length: float = Field(default=24, gt=0, le=800)
    """Its focal
    length."""


class Mute(BaseModel):
    """A section whose key says nothing of itself."""

    key: int = 1


@pytest.mark.slow
def test_a_table_has_text_value_and_default_of_each_key() -> None:
    assert job_file_table.table(Lens, "camera.").splitlines()[2:] == [
        "| `camera.kind` | text | `wide` | What it is &#124; was. |",
        "| `camera.length` | number, more than 0 to 800 | `24` | Its focal length. |",
    ]
    with pytest.raises(ValueError, match=r"Mute\.key has no text"):
        job_file_table.table(Mute, "")


def test_writing_the_tables_again_changes_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"before\n{job_file_table.START}\nold\n\n{job_file_table.END}after\n")

    job_file_table.write(page)

    assert page.read_text() == (
        f"before\n{job_file_table.START}\n{job_file_table.tables()}\n{job_file_table.END}after\n"
    )


def rows_of(page: Path, title: str) -> list[list[str]]:
    """Return the cells of the first table below a heading, without its header."""
    _, _, text = page.read_text().partition(f"\n{title}\n")
    table = re.search(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    assert table, f"{page}: no table below {title}"
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[0].splitlines()[2:]]


def test_the_columns_of_the_metadata_are_on_their_page() -> None:
    rows = rows_of(ROOT / "flux_batch/output/README.md", "## Metadata")
    assert [(name.strip("`"), kind) for name, kind, _ in rows] == [
        (field.name, str(field.type)) for field in RECORD_SCHEMA
    ]


def test_the_columns_of_annotators_are_on_their_page_and_in_the_help() -> None:
    assert sorted(annotation_columns()) == sorted(BUILT_IN)
    for name, factory in BUILT_IN.items():
        if isinstance(columns := getattr(pkgutil.resolve_name(factory), "columns", 0), pa.Schema):  # or by its options
            assert annotation_columns()[name] == columns.names
    texts = [command.format_help() for command in commands().values()]
    assert [found for text in texts for found in unknown_annotations(Page(f"```sh\n{text}\n```\n"))] == []


def test_the_fields_of_the_report_are_on_their_page() -> None:
    fields = [field.name for field in dataclasses.fields(RunReport)] + ["gpu_s_of_run", "is_complete", "exit_code"]
    rows = rows_of(ROOT / "flux_batch/output/README.md", "## The report")
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row[0])) == sorted(fields)


def test_the_columns_of_prompts_are_on_their_page() -> None:
    rows = rows_of(ROOT / "jobs/README.md", "## Columns")
    assert sorted(re.findall(r"`(\w+)`", " ".join(names for names, _ in rows))) == sorted(PROMPT_FIELDS)


def test_every_file_of_a_run_is_on_its_page() -> None:
    page = Page((ROOT / "flux_batch/output/README.md").read_text())
    tree = page.of_language("text")[0]
    named = {name: value for name, value in vars(run_paths).items() if name.isupper() and name[0] != "_"}
    names = {value.rpartition("/")[2] for value in named.values() if isinstance(value, str)}
    assert len(names) > 10
    assert [name for name in sorted(names) if not re.search(rf"[ /]{re.escape(name)}\b", tree)] == []


def test_the_house_has_every_folder_and_file_at_its_top() -> None:
    house = Page((ROOT / "CONTRIBUTING.md").read_text()).of_language("text")[0]
    named = [name for line in house.splitlines() for name in re.split(r" {2,}", line.strip())[0].split()]
    package = ROOT / "flux_batch"
    folders = {f"{path.name}/" for path in package.iterdir() if (path / "__init__.py").is_file()}
    files = {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert sorted(named) == sorted(folders | files)


def test_pages_and_their_images_are_not_packed() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packed = [path for pattern in tools["package-data"]["flux_batch"] for path in (ROOT / "flux_batch").glob(pattern)]
    assert {path.suffix for path in packed} >= {".parquet", ".safetensors"}
    assert [path.name for path in packed if path.suffix in (".md", ".webp")] == ["SKILL.md"]  # `skill` prints it


def test_the_page_for_agents_has_the_exit_codes_and_keys_of_a_skill() -> None:
    page = Page((ROOT / "flux_batch/SKILL.md").read_text())
    _, head, text = page.text.split("---\n", 2)
    assert set(yaml.safe_load(head)) == {"name", "description"}
    codes = [row[0] for row in rows_of(ROOT / "README.md", "## Exit codes")]
    assert [row[0] for row in rows_of(ROOT / "flux_batch/SKILL.md", "## Exit codes")] == codes
    assert len(text.splitlines()) <= MAX_SKILL_LINES
