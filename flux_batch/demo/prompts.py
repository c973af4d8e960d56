"""The prompts that ship with the package: 24 rows in a Parquet file; knows no model.

`python -m flux_batch.demo.prompts` writes the file again.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from flux_batch.demo.captions import TEXTURES, WORDINGS, Scene, phrase, pick, random_scene

ROWS_PER_CATEGORY = 6
SEED = 24
NEGATIVE_PROMPTS = ("blurry, noisy", "text, letters", "a photograph of a person")


def demo_prompts_path() -> Path:
    """Return the Parquet file with the demo prompts."""
    return Path(__file__).with_name("prompts.parquet")


def prompt_rows() -> list[dict[str, Any]]:
    """Make the rows: four categories of six prompts.

    A size, seed or negative prompt of None is the job's. In each category one row is wide, one is high, two have
    their own seed and two a negative prompt, so that a run of the demo meets every column filled and empty.
    """
    rng = random.Random(SEED)
    rows: list[dict[str, Any]] = []
    for category in ("one object", "relation", "gradient", "texture"):
        for place in range(ROWS_PER_CATEGORY):
            width, height = {2: (192, 128), 4: (128, 192)}.get(place, (None, None))
            rows.append(
                {
                    "id": f"demo-{len(rows):02}",
                    "prompt": phrase(scene_of(category, rng), pick(rng, range(len(WORDINGS)))),
                    "negative_prompt": pick(rng, NEGATIVE_PROMPTS) if place in (1, 4) else None,
                    "width": width,
                    "height": height,
                    "seed": 1000 + len(rows) if place in (3, 4) else None,
                    "category": category,
                }
            )
    return rows


def scene_of(category: str, rng: random.Random) -> Scene:
    """Draw a scene of a category."""
    if category == "one object":
        return random_scene(rng, num_things=1, texture="plain")
    if category == "relation":
        return random_scene(rng, num_things=2, texture="plain")
    if category == "gradient":
        return random_scene(rng, texture="gradient")
    return random_scene(rng, texture=pick(rng, [name for name in TEXTURES if name not in ("plain", "gradient")]))


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
            ("width", number),
            ("height", number),
            ("seed", number),
            ("category", text),
        ]
    )
    pq.write_table(pa.Table.from_pylist(prompt_rows(), schema=schema), path)


if __name__ == "__main__":
    write_prompts(demo_prompts_path())
