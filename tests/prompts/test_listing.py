"""The listing of a folder: its prompt files, and the skipped files by reason."""

from __future__ import annotations

import gzip
import json
import os
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from flux_batch.config.schema import PromptsConfig, SamplingConfig
from flux_batch.errors import SourceError
from flux_batch.output.paths import PLAN
from flux_batch.plan.plan import make_plan
from flux_batch.prompts.listing import list_prompts, skipped_notes
from flux_batch.prompts.source import PromptSource
from flux_batch.records import ImageRequest
from helpers.web_server import web_server


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"from {name}\n")


@pytest.mark.parametrize(
    ("uris", "expected"),
    [
        (["{}"], ["a.txt", "b.txt", "sub/c.txt"]),
        (["{}/"], ["a.txt", "b.txt", "sub/c.txt"]),
        (["{}/*.txt"], ["a.txt", "b.txt"]),
        (["{}/**/*.txt"], ["a.txt", "b.txt", "sub/c.txt"]),
        (["{}/[bc].txt"], ["b.txt"]),
        (["{}/b.txt"], ["b.txt"]),
        (["{}/b.txt", "{}/a.txt", "{}/b.txt"], ["a.txt", "b.txt"]),
        (["{}/sub", "{}/_hidden.txt"], ["_hidden.txt", "sub/c.txt"]),
        (["{}/_*.txt"], ["_hidden.txt"]),
    ],
)
def test_a_file_folder_glob_or_list_names_files_in_a_fixed_order(
    tmp_path: Path, uris: list[str], expected: list[str]
) -> None:
    fill(tmp_path, "b.txt", "a.txt", "sub/c.txt", "_hidden.txt", ".part.txt", "notes.md", "sub/_SUCCESS")

    listing = list_prompts([uri.format(tmp_path) for uri in uris], {})

    assert [file.name for file in listing.files] == expected


@pytest.mark.parametrize(
    "name",
    [
        ".ipynb_checkpoints/p-checkpoint.csv",
        "..2026_01_01_00_00_00/p.csv",
        "_delta_log/00000000000000000010.checkpoint.parquet",
        "_temporary/0/p.csv",
        "sub/.git/p.txt",
        "__MACOSX/p.csv",
        "._p.csv",
    ],
)
@pytest.mark.parametrize("glob", ["", "/**"])
def test_hidden_and_marker_folders_are_left_out_and_counted(tmp_path: Path, name: str, glob: str) -> None:
    fill(tmp_path, "p.csv", "_year=2026/q.csv", name)

    listing = list_prompts([f"{tmp_path}{glob}"], {})

    assert [file.name for file in listing.files] == ["_year=2026/q.csv", "p.csv"]
    assert name in listing.skipped["hidden by a name that begins with . or _"]


def test_what_is_named_itself_may_be_hidden(tmp_path: Path) -> None:
    fill(tmp_path, ".cache/_in/p.csv", ".cache/_in/_x/p.csv")

    assert [file.name for file in list_prompts([f"{tmp_path}/.cache/_in"], {}).files] == ["p.csv"]
    assert [file.name for file in list_prompts([f"{tmp_path}/.cache/_in/*.csv"], {}).files] == ["p.csv"]


@pytest.mark.parametrize("glob", ["", "/**"])
def test_outputs_of_runs_are_no_prompts(tmp_path: Path, glob: str) -> None:
    output = ["out/a/train/00000.tar", "out/a/metadata/00000.parquet", "out/a/README.md", f"out/a/{PLAN}"]
    fill(tmp_path, "p.csv", "out/q.csv", *output)

    listing = list_prompts([f"{tmp_path}{glob}"], {})

    assert [file.name for file in listing.files] == ["out/q.csv", "p.csv"]
    assert sorted(listing.skipped["in the output of a run"]) == sorted(output)


def test_the_output_of_a_run_that_is_named_itself_is_read(tmp_path: Path) -> None:
    fill(tmp_path, "metadata/00000.parquet", PLAN)

    assert [file.name for file in list_prompts([str(tmp_path)], {}).files] == ["metadata/00000.parquet"]


def test_a_run_begun_before_outputs_were_left_out_keeps_its_files(tmp_path: Path) -> None:
    fill(tmp_path, "p.csv", "out/metadata/00000.parquet", f"out/{PLAN}")

    names = [file.name for file in list_prompts([str(tmp_path)], {}, rules=4).files]

    assert names == ["out/metadata/00000.parquet", "p.csv"]


def test_a_mounted_config_map_is_read_once(tmp_path: Path) -> None:
    fill(tmp_path, "..2026_01_01/p.csv")
    os.symlink("..2026_01_01", tmp_path / "..data")
    os.symlink("..data/p.csv", tmp_path / "p.csv")

    assert [file.name for file in list_prompts([str(tmp_path)], {}).files] == ["p.csv"]


def test_every_file_that_is_left_out_is_said_with_the_reason(tmp_path: Path) -> None:
    fill(
        tmp_path, "a.jsonl", "requirements.txt", "LICENSE.txt", "readme-first.txt", "b.xlsx", "c.md", "d.png", "LICENSE"
    )
    fill(tmp_path, "dataset_info.json", "license_plates.csv", "requirement.txt")

    listing = list_prompts([str(tmp_path)], {})

    assert [file.name for file in listing.files] == ["a.jsonl", "license_plates.csv", "requirement.txt"]
    assert skipped_notes(listing.skipped) == [
        "1 file left out, .md is not read: save it as text, one prompt per line (.txt): c.md",
        "1 file left out, .xlsx is not read: save the sheet as CSV: b.xlsx",
        "4 files left out, named like a document, not like prompts: LICENSE.txt, dataset_info.json, "
        "readme-first.txt, ...",
        "2 files left out, of a format that is not read: LICENSE, d.png",
    ]


def test_a_folder_without_prompts_says_what_it_has_instead(tmp_path: Path) -> None:
    fill(tmp_path, "p.xlsx")

    with pytest.raises(SourceError, match=r"no prompts found; expected files with suffix \.parquet.*\.xlsx is not"):
        list_prompts([str(tmp_path)], {})


def test_a_run_keeps_to_the_rules_that_it_was_planned_by(tmp_path: Path) -> None:
    fill(tmp_path, "p.csv", "_x/p.csv", "README.txt", "q.tsv")

    assert [file.name for file in list_prompts([str(tmp_path)], {}, rules=1).files] == [
        "README.txt",
        "_x/p.csv",
        "p.csv",
    ]


def test_notes_reach_the_plan(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,Seed,steps,cfg,note\na,1,2,3,x\n")
    fill(tmp_path, "p.xlsx")

    notes = make_plan(PromptsConfig(uri=str(tmp_path), columns={"cfg_scale": "cfg"}), 4).notes

    assert notes == (
        "1 file left out, .xlsx is not read: save the sheet as CSV: p.xlsx",
        "column 'Seed' is not used: prompts.columns: {seed: Seed} would use it",
        "column 'steps' is not used: prompts.columns: {num_inference_steps: steps} would use it",
    )


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("Prompt,id", r"no column 'prompt'; name yours in prompts\.columns\.prompt; did you mean 'Prompt'\?"),
        ("id,caption", r"no column 'prompt'; name yours in prompts\.columns\.prompt; did you mean 'caption'\?"),
        ("words,id", r"no column 'prompt'; name yours in prompts\.columns\.prompt; it has words, id"),
        ("prompt,seed,seed", r"column 'seed' is twice in the header"),
    ],
)
def test_a_header_that_cannot_be_used_is_refused_with_what_is_there(tmp_path: Path, header: str, words: str) -> None:
    (tmp_path / "p.csv").write_text(f"{header}\na,b,c\n")

    with pytest.raises(SourceError, match=words):
        make_plan(PromptsConfig(uri=str(tmp_path / "p.csv")), 4)


def test_a_glob_of_the_folders_of_spark_reads_what_is_in_them(tmp_path: Path) -> None:
    for name in ("a.parquet/part-0.parquet", "a.parquet/_SUCCESS", "b.parquet/part-0.parquet", "c/part-0.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")

    found = list_prompts([f"{tmp_path}/*.parquet"], {})

    assert [file.name for file in found.files] == ["a.parquet/part-0.parquet", "b.parquet/part-0.parquet"]


def test_folders_that_a_glob_enters_do_not_count_as_files_that_are_left_out(tmp_path: Path) -> None:
    fill(tmp_path, "p.csv", "sub/q.csv", "sub/below/r.csv", "notes.xyz")

    every = list_prompts([f"{tmp_path}/**"], {})
    assert [file.name for file in every.files] == ["p.csv", "sub/below/r.csv", "sub/q.csv"]
    assert dict(every.skipped) == {"of a format that is not read": ["notes.xyz"]}
    # Folders that the glob does not enter are reported as skipped.
    assert list_prompts([f"{tmp_path}/*"], {}).skipped == {"of a format that is not read": ["notes.xyz", "sub"]}


def test_partitions_are_columns(tmp_path: Path) -> None:
    fill(tmp_path, "seed=5/kind=a%20b/p.txt", "seed=__HIVE_DEFAULT_PARTITION__/kind=c/p.txt")
    config = PromptsConfig(uri=str(tmp_path), passthrough=("kind",))
    plan = make_plan(config, 4)

    rows = [row for shard in plan.shards for row in PromptSource(config).read(shard, SamplingConfig())]

    assert [row.passthrough for row in rows] == [{"kind": "a b"}, {"kind": "c"}]
    assert [row.seeds[0] == 5 for row in rows if isinstance(row, ImageRequest)] == [True, False]


def test_partitions_are_no_ids_and_no_columns_of_a_run_begun_before_them(tmp_path: Path) -> None:
    fill(tmp_path, "id=7/seed=5/p.txt")
    config = PromptsConfig(uri=str(tmp_path))
    (shard,) = make_plan(config, 4).shards

    new, old = ([*PromptSource(config, rules).read(shard, SamplingConfig())] for rules in (2, 1))

    assert new[0].id == old[0].id == f"{shard.parts[0].name}:0"
    assert [row.seeds[0] == 5 for row in (*new, *old) if isinstance(row, ImageRequest)] == [True, False]


@pytest.mark.parametrize("encoding", ["", "gzip"])
@pytest.mark.parametrize("path", ["/p.csv", "/export?format=csv&key=1", "/rows.jsonl?sig=1"])
def test_an_answer_of_a_web_server_that_does_not_say_how_long_it_is(path: str, encoding: str) -> None:
    texts = [f"a cat {number} {'x' * 90}" for number in range(100)]
    lines = [json.dumps({"prompt": text}) for text in texts] if "jsonl" in path else ["prompt", *texts]
    data = "\n".join(lines).encode()

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        if encoding:
            request.send_header("Content-Encoding", encoding)
        request.end_headers()
        request.wfile.write(gzip.compress(data) if encoding else data)

    with web_server() as server:
        config = PromptsConfig(uri=server.at(path, answer))
        plan = make_plan(config, 60)
        rows = [row for shard in plan.shards for row in PromptSource(config).read(shard, SamplingConfig())]

    assert [row.prompt for row in rows] == texts
    assert "sig" not in rows[0].id
