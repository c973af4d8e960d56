"""Image prompts with Redux: compared with diffusers, its files, several images, and a job."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from flux_batch import FluxImagePipeline
from flux_batch.engine.local import LocalEngine
from flux_batch.errors import CheckpointError, InvalidSetting
from flux_batch.job import run
from flux_batch.plan.memory import memory
from helpers.job_files import make_job, metadata
from helpers.parity import load_reference, reference_latents
from helpers.tiny_calls import CPU, SMALL, noise_image
from helpers.tiny_redux import load_prior, make_tiny_redux

IMAGES = [noise_image(60, 40), noise_image(44, 44).rotate(90), Image.new("LA", (20, 90), (90, 128))]


@pytest.fixture(scope="module")
def redux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_redux(tmp_path_factory.mktemp("redux"))


@pytest.fixture(scope="module")
def reading(repository: Path, redux: Path) -> FluxImagePipeline:
    return with_redux(repository, redux)


def with_redux(repository: Path, *redux: Any) -> FluxImagePipeline:
    pipe = FluxImagePipeline.from_pretrained(repository, **CPU)
    pipe.load_redux(*redux)
    return pipe


@pytest.mark.parametrize(("prompt", "scale"), [("", 1.0), ("a cat that holds a sign", 2.0)])
def test_an_image_prompt(reading: FluxImagePipeline, repository: Path, redux: Path, prompt: str, scale: float) -> None:
    reference = load_reference(repository)
    embeds = load_prior(redux, reference)(IMAGES[0], prompt=prompt)
    assert embeds.prompt_embeds.shape[1] == 64 + 9
    theirs: dict[str, Any] = {"guidance_scale": 2.5}
    if scale != 1:
        theirs |= {"true_cfg_scale": scale, "negative_prompt": "blurry"}
    expected = reference_latents(
        reference,
        64,
        96,
        prompt_embeds=embeds.prompt_embeds,
        pooled_prompt_embeds=embeds.pooled_prompt_embeds,
        generator=torch.Generator("cpu").manual_seed(5),
        num_inference_steps=3,
        output_type="latent",
        **theirs,
    )
    ours = {"seed": 5, "output_type": "latent", **SMALL, "cfg_scale": scale, "negative_prompt": "blurry"}
    found = reading(prompt, image_prompt=IMAGES[0], **ours)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    ones = reading([prompt, "x"], image_prompt=[[IMAGES[0]], [IMAGES[1]]], **ours | {"seed": [5, 6]})
    torch.testing.assert_close(ones[:1], expected, atol=1e-4, rtol=0)


def test_several_images_follow_one_another_by_their_weights(reading: FluxImagePipeline) -> None:
    common = {"seed": 3, "output_type": "latent", **SMALL}
    one, two = IMAGES[0], IMAGES[2]
    both = reading("x", image_prompt=[one, two], image_prompt_scale=[1.0, 0.5], **common)
    with torch.inference_mode():
        embeds = reading.encode_prompt("x")
        redux = reading.image_prompts.redux
        assert redux is not None
        tokens = [redux.beside(embeds, [[each]], [[1.0]]).prompt_embeds[:, 64:] for each in (one, two)]
    joined = torch.cat((embeds.prompt_embeds, tokens[0], 0.5 * tokens[1]), dim=1)
    stands_in = {"prompt_embeds": joined, "pooled_prompt_embeds": embeds.pooled_prompt_embeds}
    torch.testing.assert_close(reading(None, **stands_in, **common), both, atol=1e-5, rtol=0)
    swapped = reading("x", image_prompt=[two, one], image_prompt_scale=[0.5, 1.0], **common)
    torch.testing.assert_close(swapped, both, atol=1e-4, rtol=0)
    assert (reading("x", image_prompt=[one, two], **common) - both).abs().max() > 1e-3


def test_an_image_is_encoded_once(reading: FluxImagePipeline) -> None:
    calls = 0
    assert reading.image_prompts.redux is not None

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    hook = reading.image_prompts.redux.redux.register_forward_hook(count)
    try:
        image = noise_image(31, 17)
        for _ in range(2):
            reading(["a", "b"], image_prompt=image, **SMALL | {"num_inference_steps": 1})
    finally:
        hook.remove()
    assert calls == 1


def test_files_in_either_layout(repository: Path, redux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single Redux file beside the tower, and the tower in a whole SigLIP with its head and text model."""
    (tmp_path / "image_encoder").symlink_to(redux / "image_encoder")
    state = load_file(redux / "image_embedder/diffusion_pytorch_model.safetensors")
    save_file(state, tmp_path / "flux1-redux-dev.safetensors")
    tower = load_file(redux / "image_encoder/model.safetensors")
    assert any("head." in name for name in tower)
    save_file(tower | {"text_model.x": torch.zeros(1), "logit_scale": torch.zeros(1)}, tmp_path / "siglip.safetensors")
    (tmp_path / "config.json").write_text((redux / "image_encoder/config.json").read_text())
    common = {"seed": 3, "output_type": "latent", **SMALL}
    pipe = with_redux(repository, redux)
    expected = pipe("", image_prompt=IMAGES[1], **common)
    files = tmp_path / "flux1-redux-dev.safetensors", tmp_path / "siglip.safetensors"
    for uri, encoder in ((tmp_path, None), (files[0], None), (files[0], files[1])):
        pipe.load_redux(uri, encoder)
        torch.testing.assert_close(pipe("", image_prompt=IMAGES[1], **common), expected, atol=0, rtol=0)

    monkeypatch.setenv("FLUX_BATCH_CACHE", str(tmp_path / "cache"))
    there = f"memory://{uuid.uuid4().hex}"
    fsspec.filesystem("memory").put(f"{redux}/", there, recursive=True)
    pipe.load_redux(there)
    torch.testing.assert_close(pipe("", image_prompt=IMAGES[1], **common), expected, atol=0, rtol=0)

    alone = tmp_path / "alone"
    alone.mkdir()
    save_file(state, alone / "redux.safetensors")
    with pytest.raises(CheckpointError, match=r"no vision tower for FLUX.1-Redux.*image_encoder names its file"):
        pipe.load_redux(alone)
    with pytest.raises(CheckpointError, match=r"does not hold the vision tower of a SigLIP"):
        pipe.load_redux(alone, files[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_prompt": "cat.png"}, "image_prompt is a str: must be a PIL image"),
        ({"image_prompt": IMAGES[0], "image_prompt_scale": [1.0, 2.0]}, "2 weights for 1 image"),
        ({"image_prompt": IMAGES[0], "image_prompt_scale": float("nan")}, "image_prompt_scale = nan"),
        ({"prompt": ["a", "b"], "image_prompt": [[IMAGES[0]], IMAGES[:2]]}, "must have the same number"),
    ],
)
def test_what_cannot_be_read_is_said(reading: FluxImagePipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSetting, match=message):
        reading(**{"prompt": "x"} | arguments | SMALL)


def test_a_model_without_a_redux_says_so(pipe: FluxImagePipeline) -> None:
    with pytest.raises(InvalidSetting, match=r"image_prompt: FLUX.1 reads none by itself: load a FLUX.1-Redux"):
        pipe("x", image_prompt=IMAGES[0], **SMALL)


def test_rows_with_image_prompts(repository: Path, redux: Path, tmp_path: Path) -> None:
    for number, image in enumerate(IMAGES):
        image.save(tmp_path / f"{number}.png")
    rows: list[dict[str, Any]] = [
        {"prompt": "none", "image_prompt": None, "image_prompt_scale": None},
        {"prompt": "", "image_prompt": ["0.png"], "image_prompt_scale": None},
        {"prompt": "two", "image_prompt": ["0.png", "1.png"], "image_prompt_scale": [1.0, 0.25]},
        {"prompt": "both", "image_prompt": ["0.png", "2.png"], "image_prompt_scale": [0.5]},
        {"prompt": "gone", "image_prompt": ["7.png"], "image_prompt_scale": None},
        {"prompt": "three", "image_prompt": ["0.png"], "image_prompt_scale": [1.0, 2.0, 3.0]},
    ]
    model = {"uri": str(repository), "dtype": "float32", "redux": {"uri": str(redux)}}
    sampling = {"width": 32, "height": 32, "num_inference_steps": 1, "t5_sequence_length": 16}
    config = make_job(tmp_path, rows, model=model, sampling=sampling, failures={"max_ratio": 1.0})
    report = run(config, engine=LocalEngine())

    found = metadata(config)
    assert [row["status"] for row in found] == ["success"] * 4 + ["failed"] * 2, found
    assert [row["image_prompt"] for row in found[:4]] == [None, "0.png", "0.png, 1.png", "0.png, 2.png"]
    assert [row["image_prompt_scale"] for row in found[:4]] == [None, "1", "1, 0.25", "0.5, 0.5"]
    assert {row["embedded_guidance"] for row in found[:4]} == {2.5}
    assert "image_prompt 7.png: there is no file" in found[4]["error_message"]
    assert "image_prompt_scale: 3 weights for 1 image in image_prompt" in found[5]["error_message"]
    assert report.model["redux"]["uri"] == str(redux)

    counted, plain = (memory(each) for each in (config, make_job(tmp_path, model=model | {"redux": None})))
    assert counted["bytes"]["image_encoder"] > counted["bytes"]["redux"] == 4 * (32 * 72 + 72 + 72 * 24 + 24)
    assert "redux" not in plain["bytes"]

    without = make_job(tmp_path / "no", rows[1:2], model=model | {"redux": None}, failures={"max_ratio": 1.0})
    (tmp_path / "no/0.png").write_bytes((tmp_path / "0.png").read_bytes())
    run(without, engine=LocalEngine())
    assert "FLUX.1 reads none by itself" in metadata(without)[0]["error_message"]
