"""The demo prompts: 72 rows in a Parquet file in the package.

`python -m flux_batch.demo.prompts` writes the file again.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from flux_batch.demo.world.captions import (
    COLOURS,
    SHAPES,
    TEXTURES,
    WORDINGS,
    Colour,
    Scene,
    phrase,
    pick,
    pick_distinct,
    random_scene,
)

_ROWS_PER_CATEGORY = 16
_NUM_NEGATIVE = 8
_SEED = 24
_NEGATIVE_CFG_SCALE = 3.0


def demo_prompts_path() -> Path:
    """Return the path of the Parquet file with the demo prompts."""
    return Path(__file__).with_name("prompts.parquet")


def prompt_rows() -> list[dict[str, Any]]:
    """Return four categories of sixteen rows, and eight rows with a colour as negative prompt.

    For a size, seed or negative prompt of None the job's default applies. In each of the four categories two rows are
    wide, two are high and four have their own seed, so that every column has both values and nulls.
    """
    rng = random.Random(_SEED)
    rows: list[dict[str, Any]] = []
    for category in ("one object", "relation", "gradient", "texture"):
        for index in range(_ROWS_PER_CATEGORY):
            words = phrase(_scene_of(category, rng), pick(rng, range(len(WORDINGS))))
            row = _make_row(len(rows), category, words)
            row["width"], row["height"] = {2: (192, 128), 4: (128, 192)}.get(index % 8, (None, None))
            row["seed"] = 1000 + len(rows) if index % 8 in (3, 4) else None
            rows.append(row)
    for colour in pick_distinct(rng, COLOURS, _NUM_NEGATIVE):
        row = _make_row(len(rows), "negative", _words_without_colour(rng))
        rows.append({**row, "negative_prompt": _something(colour), "cfg_scale": _NEGATIVE_CFG_SCALE})
    return rows


def _make_row(number: int, category: str, prompt: str) -> dict[str, Any]:
    """Return a row with a prompt only; the job's defaults apply to all other columns."""
    nothing = dict.fromkeys(("negative_prompt", "cfg_scale", "width", "height", "seed"))
    return {"id": f"demo-{number:02}", "prompt": prompt, **nothing, "category": category}


def _scene_of(category: str, rng: random.Random) -> Scene:
    """Draw a scene of a category."""
    if category == "one object":
        return random_scene(rng, num_things=1, texture="plain")
    if category == "relation":
        return random_scene(rng, num_things=2, texture="plain")
    if category == "gradient":
        return random_scene(rng, texture="gradient")
    return random_scene(rng, texture=pick(rng, [name for name in TEXTURES if name not in ("plain", "gradient")]))


def _words_without_colour(rng: random.Random) -> str:
    """Return a prompt without any colour."""
    return f"a large {pick(rng, SHAPES)} in the centre"


def _something(colour: Colour) -> str:
    """Return a negative prompt for a colour, as users write it."""
    return f"something {colour}"


def write_prompts(path: Path) -> None:
    """Write the rows as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, number = pa.string(), pa.int64()
    schema = pa.schema(
        [
            pa.field("id", text, nullable=False),
            pa.field("prompt", text, nullable=False),
            ("negative_prompt", text),
            ("cfg_scale", pa.float64()),
            ("width", number),
            ("height", number),
            ("seed", number),
            ("category", text),
        ]
    )
    pq.write_table(pa.Table.from_pylist(prompt_rows(), schema=schema), path)


if __name__ == "__main__":
    write_prompts(demo_prompts_path())
