"""A job file for existing prompts."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import pytest

from flux_batch.cli import main
from flux_batch.config.schema import JobConfig, PromptsConfig
from flux_batch.errors import JobError
from flux_batch.plan.draft import draft_job
from flux_batch.plan.plan import make_plan


@pytest.mark.parametrize(
    ("name", "header", "columns", "passthrough"),
    [
        ("p.csv", "id,prompt,seed", {}, ()),
        ("PartiPrompts.tsv", "Prompt\tCategory\tNote: x", {"prompt": "Prompt"}, ("Category", "Note: x")),
        ("a #1.csv", "image_id,caption,width,yes", {"prompt": "caption", "id": "image_id"}, ("yes",)),
        ("\N{GRINNING FACE}.csv", "prompt,a \N{GRINNING FACE}", {}, ("a \N{GRINNING FACE}",)),
        ("ü.csv", "text,caption", {"prompt": "caption"}, ("text",)),
        (
            "near.csv",
            "prompt,steps,Negative Prompt,guidance,Seed2",
            {"num_inference_steps": "steps", "negative_prompt": "Negative Prompt", "embedded_guidance": "guidance"},
            ("Seed2",),
        ),
        (
            "twice.csv",
            "prompt,steps,num_steps,guidance_scale,guidance",
            {"num_inference_steps": "steps"},
            ("num_steps", "guidance"),
        ),
        ("numbered.csv", "n,prompt", {}, ("n",)),
        ("s.csv", "ID,Prompt ,Seed", {"prompt": "Prompt", "id": "ID", "seed": "Seed"}, ()),
    ],
)
def test_columns_are_recognised_and_the_job_can_be_planned(
    tmp_path: Path, name: str, header: str, columns: dict[str, str], passthrough: tuple[str, ...]
) -> None:
    comma = "\t" if name.endswith("tsv") else ","
    (tmp_path / name).write_text(header + "\n" + comma.join("x" * len(header.split(comma))) + "\n")
    uri = str(tmp_path / name)

    text = draft_job(uri, PromptsConfig(uri=uri))

    config = JobConfig.from_yaml(text)
    assert (config.prompts.uri, config.prompts.columns, config.prompts.passthrough) == ((uri,), columns, passthrough)
    assert make_plan(config.prompts, 4).num_prompts == 1
    assert text.count("#") > 5


@pytest.mark.parametrize(("name", "written"), [("Käfer 1.csv", "Käfer 1"), ("a\u2028b.csv", r"a\u2028b")])
def test_a_name_is_written_as_people_read_it(tmp_path: Path, name: str, written: str) -> None:
    (tmp_path / name).write_text("prompt\nx\n")
    uri = str(tmp_path / name)

    text = draft_job(uri, PromptsConfig(uri=uri))

    assert f'/{written}.csv"' in text
    assert JobConfig.from_yaml(text).prompts.uri == (uri,)


def test_prompts_without_a_column_of_prompts_are_refused_with_those_there_are(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("a,b\n1,2\n")

    with pytest.raises(JobError, match="no column looks like prompts; it has a, b"):
        draft_job("p.csv", PromptsConfig(uri=str(tmp_path / "p.csv")))


@pytest.mark.parametrize(("name", "text"), [("p.csv", ""), ("p.jsonl", '{"prompt": "cut')])
def test_prompts_without_a_row_are_refused_with_what_will_do(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)

    with pytest.raises(JobError, match=f"{name}: no row of it can be read; use e.g. a CSV file with"):
        draft_job(name, PromptsConfig(uri=str(tmp_path / name)))


@pytest.mark.slow
def test_of_a_large_file_the_first_rows_tell_the_columns(tmp_path: Path) -> None:
    rows = [f'{{"caption": "{number}"}}\n' for number in random.Random(0).sample(range(10**9), 400_000)]
    whole = gzip.compress("".join(rows).encode(), 1)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-1000])  # reading its end is an error
    uri = str(tmp_path / "a.jsonl.gz")
    assert "columns: {prompt: caption}" in draft_job(uri, PromptsConfig(uri=uri))


def test_init_writes_a_job_that_validates_and_never_over_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = str(tmp_path / "job.yaml")

    assert main(["init", path]) == 0
    assert main(["validate", path]) == 0
    assert "prompts   72 in 1 file" in capsys.readouterr().out
    small = ["--set", "sampling.width=32", "--set", "sampling.height=32", "--set", "sampling.num_inference_steps=1"]
    assert main(["preview", path, "--rows", "2", *small]) == 0
    page = Path(capsys.readouterr().out.partition("page ")[2].split()[0])
    assert page.read_text().count("<img") == 2
    (tmp_path / "bad.csv").write_text("prompt,width\na fox,33\n")
    assert (
        main(["preview", path, "--set", f"prompts.uri={tmp_path}/bad.csv", "--set", "prompts.passthrough=[]", *small])
        == 3
    )
    assert "0 images, 1 failed" in capsys.readouterr().out
    assert "shard 0: 1 image, 1 failed" in caplog.messages
    (tmp_path / "long.csv").write_text("prompt\n" + "".join(f"{'word ' * 1500}{at}\n" for at in range(5)))
    prompts = ["--set", f"prompts.uri={tmp_path}/long.csv", "--set", "prompts.passthrough=[]"]
    assert main(["preview", path, "--rows", "2", "--random", *prompts, *small]) == 0
    printed = capsys.readouterr().out
    assert "2 prompts are longer than CLIP or T5 reads" in printed
    page = Path(printed.partition("page ")[2].split()[0])
    assert page.read_text().count("not read by CLIP") == 2
    assert not (tmp_path / "out").exists()
    assert main(["init", path]) == 2
    assert "job.yaml: already exists, and is not overwritten" in capsys.readouterr().err
