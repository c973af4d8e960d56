"""Small copies of prompt files from the web: each is read, or refused with advice on how to read it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flux_batch.config.schema import JobConfig, PromptsConfig, SamplingConfig
from flux_batch.errors import FluxBatchError
from flux_batch.plan.draft import draft_job
from flux_batch.plan.plan import make_plan
from flux_batch.prompts.source import PromptSource
from flux_batch.records import FailedRow, ImageRequest


def write_diffusion_db(path: Path) -> None:
    """poloclub/diffusiondb, metadata.parquet."""
    columns = {
        "image_name": pa.array(["a.png", "b.png"]),
        "prompt": pa.array(["a renaissance portrait", "a ghost"]),
        "part_id": pa.array([1, 1], pa.uint16()),
        "seed": pa.array([2615452663, 7], pa.uint32()),
        "step": pa.array([50, 50], pa.uint16()),
        "cfg": pa.array([7.0, 7.0], pa.float32()),
        "sampler": pa.array([8, 8], pa.uint8()),
        "width": pa.array([512, 512], pa.uint16()),
        "height": pa.array([512, 640], pa.uint16()),
        "user_name": pa.array([None, "x"]),
        "timestamp": pa.array([None, 1_660_000_000_000_000_000], pa.timestamp("ns", "UTC")),
        "image_nsfw": pa.array([0.1, 2.0], pa.float32()),
    }
    pq.write_table(pa.table(columns), path)


def write_laion(path: Path) -> None:
    """laion/laion2B-en, part-00000.parquet."""
    columns = {
        "SAMPLE_ID": pa.array([1.5, 2.5]),
        "URL": pa.array(["https://x/1.jpg", "https://x/2.jpg"]),
        "TEXT": pa.array(["A cat", "A dog"]),
        "WIDTH": pa.array([336.0, 1000.0]),
        "HEIGHT": pa.array([448.0, 1000.0]),
        "similarity": pa.array([0.3, 0.4]),
    }
    pq.write_table(pa.table(columns), path)


def text(content: str | list[Any] | dict[str, Any]) -> Callable[[Path], object]:
    return lambda path: path.write_text(content if isinstance(content, str) else json.dumps(content), newline="")


COCO = {
    "info": {"description": "COCO 2017"},
    "images": [{"id": 1, "file_name": "1.jpg", "height": 480, "width": 640}],
    "licenses": [{"id": 1, "name": "CC", "url": "https://x"}],
    "annotations": [
        {"image_id": 1, "id": 5, "caption": "A bicycle"},
        {"image_id": 1, "id": 6, "caption": "A room \nwith a bed"},
    ],
}
JOURNEY = '{"img_path": "./000/a.jpg", "prompt": "A fox --ar 16:9 --v 4", "Task3": {"Caption": "A fox"}}\n'
GENEVAL = '{"tag": "counting", "include": [{"class": "cat", "count": 3}], "prompt": "a photo of three cats"}\n'
INSPIRE = "positive: 1girl, blonde\nnegative:nsfw,\nwatermark\n----------\n\npositive:a castle\n---\nnegative: fog\n"


@pytest.mark.parametrize(
    ("name", "write", "prompts"),
    [
        ("metadata.parquet", write_diffusion_db, ["a renaissance portrait", "a ghost"]),
        ("part-00000.parquet", write_laion, ["A cat", "A dog"]),
        (
            "PartiPrompts.tsv",
            text('Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\tx\n"I love\tWorld\tBasic\t"a\n'),
            ["bond", '"I love'],
        ),
        ("drawbench.csv", text('Prompts,Category\r\n"A red, blue car. ",Colors\r\nA cat.,Colors\r\n'), None),
        ("captions_val2017.json", text(COCO), ["A bicycle", "A room \nwith a bed"]),
        ("train_anno.jsonl", text(JOURNEY * 2), ["A fox --ar 16:9 --v 4"] * 2),
        ("evaluation_metadata.jsonl", text(GENEVAL), ["a photo of three cats"]),
        ("color_val.txt", text("a red car\r\na blue car"), ["a red car", "a blue car"]),
        ("anime.json", text(["a girl", "a boy"]), ["a girl", "a boy"]),
        ("test.json", text([{"id": "1-2", "prompt": "a", "generations": ["x.webp"], "ranking": [1]}]), ["a"]),
        ("tifa.json", text([{"id": "drawbench_0", "caption": "A red car", "coco_val_id": "n"}]), ["A red car"]),
        ("train.parquet", lambda path: pq.write_table(pa.table({"Prompt": ["a", "b"]}), path), ["a", "b"]),
        ("hrs.csv", text('meta_prompt,obj1,synthetic_prompt\n"a ""big"" cat",cat,\n'), None),
        ("prompt1.txt", text(INSPIRE), ["1girl, blonde", "a castle", ""]),
    ],
)
def test_init_reads_it_and_plan_without_init_says_how(
    tmp_path: Path, name: str, write: Callable[[Path], object], prompts: Sequence[str] | None
) -> None:
    path = tmp_path / name
    write(path)
    config = JobConfig.from_yaml(draft_job(str(path), PromptsConfig(uri=str(path)))).prompts

    rows = [row for shard in make_plan(config, 1).shards for row in PromptSource(config).read(shard, SamplingConfig())]

    if prompts is not None:
        assert [row.prompt for row in rows] == prompts
    column = config.columns.get("prompt", "prompt")
    if column == "prompt":
        make_plan(PromptsConfig(uri=str(path)), 8)
    else:
        with pytest.raises(FluxBatchError, match=f"no column 'prompt'.*; did you mean '{column}'\\?"):
            make_plan(PromptsConfig(uri=str(path)), 8)


def test_settings_of_other_programs_are_used_or_said(tmp_path: Path) -> None:
    write_diffusion_db(tmp_path / "metadata.parquet")
    write_laion(tmp_path / "laion.parquet")
    config = PromptsConfig(uri=str(tmp_path / "metadata.parquet"), passthrough=("timestamp", "user_name"))

    plan = make_plan(config, 8)
    (row, _) = PromptSource(config).read(plan.shards[0], SamplingConfig())

    assert isinstance(row, ImageRequest)
    assert (row.seeds, row.sampling.width, row.sampling.height) == ((2615452663,), 512, 512)
    assert "; ".join(plan.notes) == (
        "column 'cfg' is not used: prompts.columns: {cfg_scale: cfg} would use it; "
        "column 'step' is not used: prompts.columns: {num_inference_steps: step} would use it"
    )
    laion = make_plan(PromptsConfig(uri=str(tmp_path / "laion.parquet"), columns={"prompt": "TEXT"}), 8)
    assert [note.partition(" is not")[0] for note in laion.notes] == ["column 'HEIGHT'", "column 'WIDTH'"]


def test_blocks_have_negative_prompts_and_lines(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(INSPIRE)
    config = PromptsConfig(uri=str(tmp_path / "p.txt"))

    girl, castle, fog = (
        row for shard in make_plan(config, 2).shards for row in PromptSource(config).read(shard, SamplingConfig())
    )

    # As in older versions.
    assert PromptSource(config, rules=2).split(PromptSource(config).files()[0], 99)[0].num_rows == 7
    assert isinstance(girl, ImageRequest)
    assert isinstance(castle, ImageRequest)
    assert isinstance(fog, FailedRow)
    assert (girl.sampling.negative_prompt, castle.sampling.negative_prompt) == ("nsfw, watermark", "")
    assert fog.error_message == "p.txt:2 (line 8): column 'prompt' is null: a prompt is needed"


def test_a_json_file_of_several_tables_names_what_it_could_be(tmp_path: Path) -> None:
    tables = {"a": [{"prompt": "x"}], "b": [{"caption": "y"}, {"caption": "z"}]}
    (tmp_path / "p.json").write_text(json.dumps(tables))

    with pytest.raises(FluxBatchError, match="holds several tables: a, b; save one of them by itself"):
        make_plan(PromptsConfig(uri=str(tmp_path / "p.json")), 8)
