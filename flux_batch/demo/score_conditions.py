"""The share of facts that hold under a condition: `python -m flux_batch.demo.score_conditions canny|kontext`.

canny: images are drawn from the edges of scenes that are held out from training, with full captions, and with captions
without positions, which then only the edges show.
kontext: drawings of such scenes are edited, one fact each. Both use a LoRA on the demo model, and images are read back.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from flux_batch.demo.paths import demo_lora_path
from flux_batch.demo.world.captions import SCORED_SEED, WORDINGS, Caption, Scene, Unsaid, captions, phrase
from flux_batch.demo.world.drawing import draw
from flux_batch.demo.world.edges import edges
from flux_batch.demo.world.edits import Edit, edits
from flux_batch.demo.world.scorer import Fact, Scores, score, score_all
from flux_batch.errors import FluxBatchError
from flux_batch.pipeline.pipeline import FluxImagePipeline

_SIDE = 128
_BATCH = 8
# The demo model's guidance, which its LoRAs do not change; FLUX.1-Canny's own default is 30.
_SETTINGS: dict[str, Any] = {
    "width": _SIDE,
    "height": _SIDE,
    "num_inference_steps": 20,
    "embedded_guidance": 3.5,
    "t5_sequence_length": 64,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Score a LoRA and print the shares of facts that hold. Returns: the exit code."""
    arguments = parse_arguments(argv)
    try:
        (_score_canny if arguments.condition == "canny" else _score_kontext)(arguments)
    except (FluxBatchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return int(getattr(error, "exit_code", 1))
    return 0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments of a command line."""
    parser = argparse.ArgumentParser(
        prog="python -m flux_batch.demo.score_conditions", description=__doc__.splitlines()[0]
    )
    parser.add_argument("condition", choices=("canny", "kontext"))
    parser.add_argument("--model", default="demo", help="folder or URI of a model trained on the demo's world")
    parser.add_argument("--lora", help="a LoRA that the training wrote, instead of the one in the package")
    parser.add_argument("--images", type=int, default=100, help="number of scenes or edits")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write the condition beside each image there")
    arguments = parser.parse_args(argv)
    if arguments.images < 1:
        parser.error(f"--images {arguments.images}: must be 1 or more")
    return arguments


def _score_canny(arguments: argparse.Namespace) -> None:
    """Draw from edges with captions with and without positions; print the share of all facts by kind."""
    pipeline = FluxImagePipeline.from_pretrained(arguments.model, torch_dtype="float32")
    pipeline.load_lora(arguments.lora or demo_lora_path("flux-canny"))
    scenes = [caption.scene for caption in captions(arguments.images, SCORED_SEED, held_out=True)]
    controls = [edges(drawing(scene, number)) for number, scene in enumerate(scenes)]
    said = [Caption(text=phrase(scene), scene=scene) for scene in scenes]
    unsaid: dict[str, frozenset[Unsaid]] = {"in full": frozenset(), "without places": frozenset({"place"})}
    for name, facts in unsaid.items():
        prompts = [phrase(scene, number % len(WORDINGS), facts) for number, scene in enumerate(scenes)]
        images = list(_render(pipeline, prompts, {"control_image": controls}, _SETTINGS))
        print(f"captions {name}\n{score_all(said, images)}")
        _save(arguments.save and arguments.save / name.replace(" ", "_"), prompts, controls, images)


def _score_kontext(arguments: argparse.Namespace) -> None:
    """Edit drawings, and print the shares of edited facts that hold and of others kept."""
    pipeline = FluxImagePipeline.from_pretrained(arguments.model, torch_dtype="float32", variant="kontext")
    pipeline.load_lora(arguments.lora or demo_lora_path("flux-kontext"))
    chosen = list(edits(arguments.images, SCORED_SEED))
    sources = [drawing(edit.before, number) for number, edit in enumerate(chosen)]
    prompts = [edit.instruction for edit in chosen]
    images = list(_render(pipeline, prompts, {"reference_image": sources}, _SETTINGS | {"resize_references": False}))
    edited, kept = score_edits(chosen, images)
    for name, scores in (("edited", edited), ("kept", kept)):
        held = sum(fact.holds for fact in scores.facts)
        kinds = ", ".join(f"{kind} {100 * scores.share(kind):.1f} %" for kind in scores.kinds())
        print(f"{name:<6} {held} of {len(scores.facts)} facts: {100 * scores.share():.1f} % ({kinds})")
    _save(arguments.save, prompts, sources, images)


def score_edits(chosen: Sequence[Edit], images: Sequence[Image.Image]) -> tuple[Scores, Scores]:
    """Return the scores of the facts that edits change, and of all others."""
    edited: list[Fact] = []
    kept: list[Fact] = []
    for edit, image in zip(chosen, images, strict=True):
        # Before and after have the same facts in the same order: an edit changes the value of one.
        before = score(Caption(text="", scene=edit.before), image)
        for old, new in zip(before, score(Caption(text="", scene=edit.after), image), strict=True):
            (kept if old.said == new.said else edited).append(new)
    return Scores(len(images), tuple(edited)), Scores(len(images), tuple(kept))


def drawing(scene: Scene, number: int) -> Image.Image:
    """Return a drawing of a scene, the same for the same number."""
    return draw(scene, _SIDE, _SIDE, random.Random(f"condition {number}"))


def _render(
    pipeline: Callable[..., Any], prompts: Sequence[str], images: dict[str, list[Image.Image]], settings: dict[str, Any]
) -> Iterator[Image.Image]:
    """Yield the image of each prompt and its condition, in order; the seed of each is its number, from 0."""
    for start in range(0, len(prompts), _BATCH):
        part = slice(start, start + _BATCH)
        seeds = list(range(start, min(start + _BATCH, len(prompts))))
        conditions = {name: each[part] for name, each in images.items()}
        yield from pipeline(prompt=prompts[part], seed=seeds, **conditions, **settings)


def _save(
    folder: Path | None, prompts: Sequence[str], conditions: Sequence[Image.Image], images: Sequence[Image.Image]
) -> None:
    """Write each condition and image side by side, and the prompts as text."""
    if not folder:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for number, (condition, image) in enumerate(zip(conditions, images, strict=True)):
        pair = Image.new("RGB", (2 * _SIDE, _SIDE))
        pair.paste(condition, (0, 0))
        pair.paste(image, (_SIDE, 0))
        pair.save(folder / f"{number:03}.png")
    lines = [f"{number:03}  {prompt}\n" for number, prompt in enumerate(prompts)]
    (folder / "prompts.txt").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
