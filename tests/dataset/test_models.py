"""Annotators with tiny random models of transformers: the values equal those of the model itself."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoImageProcessor,
    CLIPConfig,
    CLIPModel,
    Owlv2Config,
    Owlv2ForObjectDetection,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from flux_batch.dataset.annotators.checked import CheckedAnnotator
from flux_batch.dataset.annotators.clip import Aesthetic, Clip
from flux_batch.dataset.annotators.load import AnnotatorSpec, open_annotator
from flux_batch.dataset.annotators.safety import Safety
from flux_batch.demo.paths import demo_model_folder
from flux_batch.errors import CheckpointError, DeviceFatal, InvalidSetting

ROOT = Path(__file__).parents[2]
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**SMALL, "vocab_size": 49408, "max_position_embeddings": 20}
VISION = {**SMALL, "image_size": 32, "patch_size": 16}
RECORDS = [{"prompt": "a small red star"}, {"prompt": "a long prompt " * 30}]


def images() -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 48, 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in pixels]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    shutil.copytree(demo_model_folder() / "tokenizer", folder, dirs_exist_ok=True)
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return folder


def test_clip_says_how_well_prompt_and_image_fit(clip_folder: Path) -> None:
    clip = Clip(str(clip_folder), device="cpu")
    rows: Any = CheckedAnnotator(clip, "clip").rows(images(), RECORDS)
    model = CLIPModel.from_pretrained(clip_folder)
    pixels = AutoImageProcessor.from_pretrained(clip_folder, backend="pil")(images(), return_tensors="pt")
    with torch.inference_mode():
        embeds = model.get_image_features(**pixels).pooler_output
    embeds = embeds / embeds.norm(dim=-1, keepdim=True)
    assert np.allclose([row["embedding"] for row in rows], embeds, atol=1e-5)
    assert all(-1 <= row["clip"] <= 1 for row in rows)
    assert rows[0]["clip"] != rows[1]["clip"]
    assert clip.revision
    assert Clip(str(clip_folder), embedding=False, device="cpu").columns.names == ["clip"]


def test_a_gpu_that_fails_while_a_model_is_opened_is_not_the_jobs_fault(
    clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any) -> None:
        raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")

    monkeypatch.setattr(CLIPModel, "to", fail)
    options = {"model": str(clip_folder), "device": "cpu"}
    spec = AnnotatorSpec(name="clip", annotator="clip", options=options)
    with pytest.raises(DeviceFatal, match="ECC error"):
        open_annotator(spec)


def test_an_aesthetic_head_is_applied_layer_by_layer(clip_folder: Path, tmp_path: Path) -> None:
    head = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Dropout(), torch.nn.Linear(4, 1))
    tensors = {f"layers.{name}": tensor for name, tensor in head.state_dict().items()}
    save_file(tensors, tmp_path / "head.safetensors")
    torch.save(tensors, tmp_path / "head.pth")
    embeds = torch.tensor(Clip(str(clip_folder), device="cpu")(images(), RECORDS)["embedding"])
    expected = head.eval()(embeds)[:, 0].tolist()
    for name in ("head.safetensors", "head.pth"):
        found = Aesthetic(str(tmp_path / name), str(clip_folder), device="cpu")(images(), RECORDS)["aesthetic"]
        assert found == pytest.approx(expected, abs=1e-5)
    save_file({"weight": torch.zeros(1, 9), "bias": torch.zeros(1)}, tmp_path / "wide.safetensors")
    with pytest.raises(CheckpointError, match=r"must go from the 8 of .* to 1"):
        Aesthetic(str(tmp_path / "wide.safetensors"), str(clip_folder), device="cpu")


def test_safety_sums_the_classes_that_are_unsafe(tmp_path: Path) -> None:
    labels = {0: "normal", 1: "NSFW", 2: "gore"}
    torch.manual_seed(1)
    ViTForImageClassification(ViTConfig(**SMALL, image_size=32, patch_size=16, id2label=labels)).save_pretrained(
        tmp_path
    )
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    both = Safety(str(tmp_path), device="cpu")(images(), RECORDS)
    one = Safety(str(tmp_path), unsafe_labels=["gore"], device="cpu")(images(), RECORDS)
    assert all(0 < part < whole < 1 for part, whole in zip(one["unsafe"], both["unsafe"], strict=True))
    assert set(both["label"]) <= set(labels.values())
    with pytest.raises(InvalidSetting, match=r"must name classes of .*: normal, NSFW, gore"):
        Safety(str(tmp_path), unsafe_labels=["nudity"], device="cpu")


def test_boxes_of_ones_own_are_those_of_the_named_things(tmp_path: Path) -> None:
    shutil.copytree(demo_model_folder() / "tokenizer", tmp_path, dirs_exist_ok=True)
    torch.manual_seed(2)
    config = Owlv2Config(text_config=TEXT, vision_config=VISION, projection_dim=16)
    Owlv2ForObjectDetection(config).save_pretrained(tmp_path)
    boxes = runpy.run_path(str(ROOT / "jobs/annotators/boxes.py"))["Boxes"]
    named = boxes("nouns", str(tmp_path), at_least=0.0)
    rows: Any = CheckedAnnotator(named, "boxes").rows(
        [*images(), images()[0]], [{"nouns": "star, circle"}, {"nouns": ["ring"]}, {"nouns": None}]
    )
    assert [len(row["boxes"]) for row in rows] == [4, 4, 0]
    assert {box["name"] for box in rows[0]["boxes"]} <= {"star", "circle"}
    assert all(left < right and top < bottom for row in rows for left, top, right, bottom in map(_box, row["boxes"]))


def _box(found: dict[str, Any]) -> list[float]:
    return list(found["box"])


def test_a_metric_of_others_is_wrapped() -> None:
    metric = runpy.run_path(str(ROOT / "jobs/annotators/metric.py"))["Metric"]
    rows = CheckedAnnotator(metric("helpers.annotators:Redness", scale=2), "metric").rows(images(), RECORDS)
    assert rows == [{"score": pytest.approx(2 * image.getpixel((0, 0))[0])} for image in images()]  # type: ignore[index]
