from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from flux_batch.demo.score import main, save
from flux_batch.demo.world.captions import captions
from flux_batch.demo.world.drawing import draw


def test_images_are_saved_with_their_missing_facts(tmp_path: Path) -> None:
    first, second = captions(2, seed=3, held_out=True)
    image = draw(first.scene, 128, 128, random.Random(0))

    save(tmp_path / "images", [first, second], [image, image])

    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["000.png", "001.png", "captions.txt"]
    right, wrong = (tmp_path / "images" / "captions.txt").read_text().splitlines()
    assert right == f"000  {first.text}  [all facts hold]"
    assert wrong.startswith(f"001  {second.text}  [")
    assert ", not " in wrong


def test_scores_and_settings_are_written_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--captions", "1", "--steps", "1", "--size", "96x96", "--json", str(tmp_path / "s.json")]) == 0

    written = json.loads((tmp_path / "s.json").read_text())
    assert (written["settings"]["width"], written["settings"]["num_inference_steps"]) == (96, 1)
    assert written["scores"]["num_images"] == 1
    assert f"{100 * written['scores']['share']:.1f} %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "/nowhere"], "no model folder /nowhere"),
        (["--size", "100x128"], "width = 100: must be a multiple of 16"),
        (["--lora", "/nowhere.safetensors"], "/nowhere.safetensors is not there"),
    ],
)
def test_a_bad_model_is_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--captions", "1", *arguments]) == 2

    error = capsys.readouterr().err
    assert error.startswith(f"error: {sentence}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(("option", "value"), [("--size", "128"), ("--captions", "0"), ("--batch-size", "-1")])
def test_a_bad_argument_is_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([option, value])

    assert caught.value.code == 2
    assert f"'{value}' must be" in capsys.readouterr().err
