"""How well a model draws what captions say: `python -m flux_batch.demo.score [--model demo]`.

Renders captions no training picture was drawn from and reads the pictures back.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from flux_batch.demo.captions import Caption, captions
from flux_batch.demo.scorer import Scores, score_all
from flux_batch.pipeline import FluxImagePipeline

CAPTION_SEED = 2000


def main() -> None:
    """Score a model and print a table."""
    parser = argparse.ArgumentParser(prog="python -m flux_batch.demo.score", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="folder or URI of a model trained on the demo's world")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--lora", action="append", default=[], help="a LoRA to apply; may be given more than once")
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--size", default="128x128", help="WIDTHxHEIGHT")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--t5-length", type=int, default=64)
    parser.add_argument("--step-cache", type=float, default=0.0)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--json", type=Path, help="write the scores here too")
    given = parser.parse_args()
    pipeline = FluxImagePipeline.from_pretrained(given.model, torch_dtype=given.dtype, quantization=given.quantization)
    if given.lora:
        pipeline.set_loras([(uri, 1.0) for uri in given.lora])
    width, height = (int(side) for side in given.size.split("x"))
    held_out = list(captions(given.captions, CAPTION_SEED, held_out=True))
    settings = {
        "width": width,
        "height": height,
        "num_inference_steps": given.steps,
        "embedded_guidance": given.guidance,
        "t5_sequence_length": given.t5_length,
        "step_cache": given.step_cache,
    }
    scores = score_model(pipeline, held_out, given.batch_size, settings)
    print(scores)
    if given.json:
        given.json.write_text(json.dumps({"settings": settings, "scores": scores.to_dict()}, indent=2) + "\n")


def score_model(
    pipeline: Callable[..., Any], held_out: Sequence[Caption], batch_size: int, settings: dict[str, Any]
) -> Scores:
    """Render captions, seed 0 for the first and so on, and score the pictures."""
    return score_all(held_out, list(pictures_of(pipeline, held_out, batch_size, settings)))


def pictures_of(
    pipeline: Callable[..., Any], held_out: Sequence[Caption], batch_size: int, settings: dict[str, Any]
) -> Iterator[Image.Image]:
    """Yield the picture of each caption."""
    numbered = list(enumerate(held_out))
    for start in range(0, len(numbered), batch_size):
        part = numbered[start : start + batch_size]
        yield from pipeline(
            prompt=[caption.text for _, caption in part], seed=[number for number, _ in part], **settings
        )


if __name__ == "__main__":
    main()
