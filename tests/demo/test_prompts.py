from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq

from flux_batch.demo.prompts import demo_prompts_path, prompt_rows, write_prompts
from flux_batch.sampling_params import SamplingParams
from helpers.waiting import PATIENCE_S


def test_the_packaged_file_has_the_rows_of_the_function(tmp_path: Path) -> None:
    write_prompts(tmp_path / "prompts.parquet")

    assert pq.read_table(demo_prompts_path()).equals(pq.read_table(tmp_path / "prompts.parquet"))


def test_rows_fill_and_leave_out_every_column() -> None:
    rows = prompt_rows()

    assert len(rows) == 72
    assert len({row["id"] for row in rows}) == 72
    assert Counter(row["category"] for row in rows) == {
        **dict.fromkeys(("one object", "relation", "gradient", "texture"), 16),
        "negative": 8,
    }
    assert Counter((row["width"], row["height"]) for row in rows) == {(None, None): 56, (192, 128): 8, (128, 192): 8}
    assert sum(row["seed"] is not None for row in rows) == 16
    assert [row["id"] for row in rows if row["negative_prompt"]] == [row["id"] for row in rows[-8:]]


def test_a_negative_prompt_has_a_scale_that_makes_it_count() -> None:
    assert all((row["negative_prompt"] is None) == (row["cfg_scale"] is None) for row in prompt_rows())
    assert all(row["cfg_scale"] > 1 for row in prompt_rows() if row["negative_prompt"])


def test_sizes_are_ones_that_can_be_made() -> None:
    for row in prompt_rows():
        SamplingParams(width=row["width"] or 128, height=row["height"] or 128)


def test_importing_the_demo_is_light() -> None:
    code = (
        "import sys, flux_batch.demo.paths, flux_batch.demo.prompts, flux_batch.demo.world.captions; "
        "sys.exit(str({'torch', 'pyarrow', 'transformers', 'ray'} & set(sys.modules) or ''))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=PATIENCE_S)

    assert done.stderr.strip() == ""
