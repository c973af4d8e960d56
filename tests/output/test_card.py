import json
from pathlib import Path

import pytest
import yaml

from flux_batch.config.schema import JobConfig
from flux_batch.engine.local import LocalEngine
from flux_batch.job import run
from flux_batch.output.card import card
from helpers.fakes import make_fake_pipeline
from helpers.job_files import make_job


@pytest.mark.parametrize("layout", ["webdataset", "files", "parquet"])
def test_datasets_loads_an_output_by_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    rows = [{"prompt": f"image {number}", "class": None if number == 1 else "x"} for number in range(6)]
    config = make_job(
        tmp_path, [*rows, {"prompt": None}], prompts={"passthrough": ["class"]}, output={"format": layout}
    )
    run(config, engine=LocalEngine(), make_pipeline=make_fake_pipeline)
    header = yaml.safe_load((tmp_path / "out/README.md").read_text().split("---")[1])
    assert header["configs"][0]["data_files"][0]["split"] == "train"
    loaded = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    samples = [sample.get("json") or sample for sample in loaded]
    # imagefolder has no defined order.
    assert sorted(sample["prompt"] for sample in samples) == [f"image {number}" for number in range(6)]
    assert all((sample.get("png") or sample["image"]).size == (16, 16) for sample in loaded)


def test_a_recipe_is_on_the_card() -> None:
    samplers = {"a": {"choice": {"x": 0.2, "y": 0.8}}, "b": {"file": "https://host/words.txt?sig=secret"}}
    prompts = {"rows": 3, "samplers": samplers, "template": "A {{ a }}"}
    config = JobConfig.from_dict({"prompts": prompts, "output": {"uri": "out"}, "model": {"uri": "demo"}})

    made = json.loads(card(config, 3).partition("```json")[2].partition("```")[0])

    public = samplers | {"b": {"file": "https://host/words.txt"}}
    assert made == {"template": "A {{ a }}", "samplers": public, "design": "random"}
    assert "secret" not in config.to_yaml() + str(config.identity())
