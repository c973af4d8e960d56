"""The share of the facts of captions that hold in a model's images: `python -m flux_batch.demo.score [--model demo]`.

It renders captions that are held out from training, and reads the images back.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from flux_batch.demo.world.captions import SCORED_SEED, Caption, captions
from flux_batch.demo.world.scorer import Scores, score_all
from flux_batch.errors import FluxBatchError
from flux_batch.pipeline.pipeline import FluxImagePipeline


def main(argv: Sequence[str] | None = None) -> int:
    """Score a model and print a table. Returns: the exit code."""
    arguments = parse_arguments(argv)
    try:
        _score(arguments)
    except (FluxBatchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return int(getattr(error, "exit_code", 1))
    return 0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments of a command line."""
    parser = argparse.ArgumentParser(prog="python -m flux_batch.demo.score", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="folder or URI of a model trained on the demo's world")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--lora", action="append", default=[], help="a LoRA to apply; may be given more than once")
    parser.add_argument("--captions", type=_positive, default=200, help="number of held-out captions")
    parser.add_argument("--size", type=_size, default="128x128", metavar="WIDTHxHEIGHT")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.5, help="the guidance value the model embeds")
    parser.add_argument("--cfg-scale", type=float, default=1.0, help="classifier-free guidance; 1 is off")
    parser.add_argument("--negative-prompt", default="", help="what images should not show; needs --cfg-scale")
    parser.add_argument("--t5-length", type=int, default=64)
    parser.add_argument("--step-cache", type=float, default=0.0)
    parser.add_argument("--batch-size", type=_positive, default=8)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the scores to this file")
    parser.add_argument(
        "--save",
        type=Path,
        metavar="FOLDER",
        help="write images and missing facts to this folder",
    )
    return parser.parse_args(argv)


def _score(arguments: argparse.Namespace) -> None:
    """Render captions, read the images back, print the scores and write the requested files."""
    pipeline = FluxImagePipeline.from_pretrained(
        arguments.model, torch_dtype=arguments.dtype, quantization=arguments.quantization
    )
    if arguments.lora:
        pipeline.set_loras([(uri, 1.0) for uri in arguments.lora])
    held_out = list(captions(arguments.captions, SCORED_SEED, held_out=True))
    settings = {
        "width": arguments.size[0],
        "height": arguments.size[1],
        "num_inference_steps": arguments.steps,
        "embedded_guidance": arguments.guidance,
        "cfg_scale": arguments.cfg_scale,
        "negative_prompt": arguments.negative_prompt,
        "t5_sequence_length": arguments.t5_length,
        "step_cache": arguments.step_cache,
    }
    images = list(render(pipeline, held_out, arguments.batch_size, settings))
    scores = score_all(held_out, images)
    print(scores)
    if arguments.json:
        arguments.json.write_text(json.dumps({"settings": settings, "scores": scores.to_dict()}, indent=2) + "\n")
    if arguments.save:
        save(arguments.save, held_out, images)


def save(folder: Path, held_out: Sequence[Caption], images: Sequence[Image.Image]) -> None:
    """Write the images, and a text file of captions with the facts their images lack."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (caption, image) in enumerate(zip(held_out, images, strict=True)):
        image.save(folder / f"{number:03}.png")
        missing = [fact for fact in score_all([caption], [image]).facts if not fact.holds]
        found = "; ".join(f"{fact.kind}: {fact.said}, not {fact.shown or 'seen'}" for fact in missing)
        lines.append(f"{number:03}  {caption.text}  [{found or 'all facts hold'}]\n")
    (folder / "captions.txt").write_text("".join(lines), encoding="utf-8")


def score_model(
    pipeline: Callable[..., Any], held_out: Sequence[Caption], batch_size: int, settings: dict[str, Any]
) -> Scores:
    """Render captions and score the images; the seed of each is its number, from 0."""
    return score_all(held_out, list(render(pipeline, held_out, batch_size, settings)))


def render(
    pipeline: Callable[..., Any], held_out: Sequence[Caption], batch_size: int, settings: dict[str, Any]
) -> Iterator[Image.Image]:
    """Yield the image of each caption, in order."""
    numbered = list(enumerate(held_out))
    for start in range(0, len(numbered), batch_size):
        part = numbered[start : start + batch_size]
        yield from pipeline(
            prompt=[caption.text for _, caption in part], seed=[number for number, _ in part], **settings
        )


def _size(text: str) -> tuple[int, int]:
    """Parse WIDTHxHEIGHT, for argparse."""
    if not (match := re.fullmatch(r"(\d+)x(\d+)", text)):
        raise argparse.ArgumentTypeError(f"{text!r} must be WIDTHxHEIGHT, e.g. 128x128")
    return int(match[1]), int(match[2])


def _positive(text: str) -> int:
    """Parse a whole number of at least 1, for argparse."""
    if not re.fullmatch(r"0*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 1 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
