"""The demo model's LoRAs that read an image: they follow the prompt, and keep the rest of the image."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from PIL import Image

from flux_batch.demo.paths import demo_lora_path
from flux_batch.demo.score_conditions import drawing, main, score_edits
from flux_batch.demo.world.drawing import draw
from flux_batch.demo.world.edits import edits


def test_edited_and_kept_facts_are_counted_apart() -> None:
    chosen = list(edits(12, seed=3))

    edited, kept = score_edits(chosen, [drawing(edit.after, number) for number, edit in enumerate(chosen)])
    assert (edited.share(), kept.share()) == (1.0, 1.0)
    assert len(edited.facts) == 12

    edited, kept = score_edits(chosen, [drawing(edit.before, number) for number, edit in enumerate(chosen)])
    assert (edited.share(), kept.share()) == (0.0, 1.0)

    edited, kept = score_edits(chosen[:1], [Image.new("RGB", (128, 128))])
    assert edited.share() == 0.0
    assert kept.share() < 0.5


def test_an_edit_and_its_source_are_drawn_alike() -> None:
    edit = next(edit for edit in edits(6, seed=3) if edit.before.first.colour != edit.after.first.colour)
    before, after = (draw(scene, 128, 128, random.Random(1)) for scene in (edit.before, edit.after))

    assert before.crop((0, 0, 4, 4)).tobytes() == after.crop((0, 0, 4, 4)).tobytes()


def test_edits_are_made_of_a_model_that_cannot_edit_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = str(demo_lora_path("blueprint"))
    assert main(["kontext", "--images", "1", "--lora", lora, "--save", str(tmp_path)]) == 0

    edited, kept = capsys.readouterr().out.splitlines()
    assert edited == "edited 0 of 1 facts: 0.0 % (colour 0.0 %)"
    assert kept.startswith("kept ")
    assert (tmp_path / "prompts.txt").read_text().startswith("000  ")
    with Image.open(tmp_path / "000.png") as pair:
        assert pair.size == (256, 128)


@pytest.mark.long
def test_what_is_told_is_edited_and_the_rest_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kontext", "--images", "96"]) == 0

    edited, kept = (float(line.split(" %")[0].split()[-1]) for line in capsys.readouterr().out.splitlines())
    assert edited >= 85
    assert kept >= 90


@pytest.mark.long
def test_what_is_drawn_to_edges_lies_where_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["canny", "--images", "96"]) == 0

    in_full, _, without_places = capsys.readouterr().out.removeprefix("captions ").partition("captions ")
    assert shares(in_full)["all"] >= 98
    assert min(shares(without_places)[kind] for kind in ("position", "relation")) >= 95


def shares(printed: str) -> dict[str, float]:
    """Return the printed share of each kind of fact, 0 to 100."""
    return {line[:18].strip(): float(line.split()[-2]) for line in printed.splitlines() if line.endswith("%")}


def test_a_bad_lora_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kontext", "--images", "1", "--lora", "/nowhere.safetensors"]) == 2

    assert capsys.readouterr().err == "error: /nowhere.safetensors is not there\n"


@pytest.mark.parametrize("number", ["0", "-1"])
def test_no_images_are_refused(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["canny", "--images", number])

    assert caught.value.code == 2
    assert f"--images {number}: must be 1 or more" in capsys.readouterr().err
