"""Image prompts with an IP-Adapter: compared with diffusers, its files, and a job."""

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
from flux_batch.config.schema import ModelConfig
from flux_batch.engine.local import LocalEngine
from flux_batch.errors import CheckpointError, InvalidSetting, JobError
from flux_batch.job import run
from flux_batch.pipeline.load import load_pipeline
from flux_batch.plan.memory import memory
from helpers.job_files import make_job, metadata
from helpers.parity import load_reference, reference_latents
from helpers.tiny_calls import CPU, SMALL, noise_image
from helpers.tiny_flux import TinyFlux
from helpers.tiny_ip_adapter import adapter_state, load_into, make_tiny_ip_adapter
from helpers.tiny_redux import make_tiny_redux

IMAGES = [noise_image(60, 40), noise_image(33, 71).rotate(90), noise_image(28, 28).convert("L")]
LATENTS = {"output_type": "latent", **SMALL}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_ip_adapter(tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def reading(repository: Path, adapter: Path) -> FluxImagePipeline:
    pipe = FluxImagePipeline.from_pretrained(repository, **CPU)
    pipe.load_ip_adapter(adapter, weight_name="ip_adapter.safetensors")
    return pipe


@pytest.fixture(scope="module")
def reference(repository: Path, adapter: Path) -> Any:
    return load_into(load_reference(repository), adapter)


@pytest.mark.parametrize(
    ("images", "scale", "cfg_scale"), [(IMAGES[:1], 1.0, 1.0), (IMAGES[1:], 0.7, 2.0), (IMAGES[:1], [0.2, 1.5], 1.0)]
)
def test_image_prompts(
    reading: FluxImagePipeline, reference: Any, images: list[Image.Image], scale: Any, cfg_scale: float
) -> None:
    reference.set_ip_adapter_scale(scale)
    expected = reference_latents(
        reference,
        64,
        96,
        prompt="a cat that holds a sign",
        ip_adapter_image=[[image.convert("RGB") for image in images]],
        generator=torch.Generator("cpu").manual_seed(5),
        num_inference_steps=3,
        true_cfg_scale=cfg_scale,
        negative_prompt="blurry",
        output_type="latent",
    )
    reading.set_ip_adapter_scale(scale)
    options: dict[str, Any] = {"cfg_scale": cfg_scale, "negative_prompt": "blurry", **LATENTS}
    try:
        found = reading("a cat that holds a sign", ip_adapter_image=images, seed=5, **options)
        texts, others = ["a cat that holds a sign", "x"], [images, IMAGES[: len(images)]]
        both = reading(texts, image_prompt=others, seed=[5, 6], step_cache=1e-6, **options)
    finally:
        reading.set_ip_adapter_scale(1.0)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(both[:1], expected, atol=1e-4, rtol=0)


def test_weights_of_images(reading: FluxImagePipeline, pipe: FluxImagePipeline) -> None:
    """The weight of a single image acts like the adapter's scale; a weight of 0 has no effect."""
    scaled = reading("x", image_prompt=IMAGES[0], image_prompt_scale=0.5, seed=1, **LATENTS)
    reading.set_ip_adapter_scale(0.5)
    try:
        expected = reading("x", image_prompt=IMAGES[0], seed=1, **LATENTS)
    finally:
        reading.set_ip_adapter_scale(1.0)
    torch.testing.assert_close(scaled, expected, atol=1e-5, rtol=0)
    plain = pipe("x", seed=1, **LATENTS)
    torch.testing.assert_close(reading("x", seed=1, **LATENTS), plain, atol=0, rtol=0)
    off = reading("x", image_prompt=IMAGES[:2], image_prompt_scale=0.0, seed=1, **LATENTS)
    torch.testing.assert_close(off, plain, atol=1e-5, rtol=0)
    assert (expected - plain).abs().max() > 1e-2


def test_several_adapters_and_embeddings_of_images(repository: Path, tmp_path: Path) -> None:
    adapter = make_tiny_ip_adapter(tmp_path)
    names = ["ip_adapter.safetensors", "other.safetensors"]
    save_file(adapter_state(TinyFlux(), seed=4), adapter / names[1])
    reference = load_into(load_reference(repository), adapter, names)
    pipe = FluxImagePipeline.from_pretrained(repository, **CPU)
    pipe.load_ip_adapter(adapter, names, scale=[0.7, [0.2, 1.5]])
    assert len({id(each.encoder) for each in pipe.image_prompts.ip_adapters}) == 1
    reference.set_ip_adapter_scale([0.7, [0.2, 1.5]])
    common: dict[str, Any] = {"prompt": "a cat", "negative_prompt": "blurry"}
    each = [IMAGES[0], [IMAGES[1], IMAGES[0]]]
    expected = reference_latents(
        reference,
        64,
        96,
        **common,
        ip_adapter_image=each,
        generator=torch.Generator("cpu").manual_seed(5),
        num_inference_steps=3,
        true_cfg_scale=2.0,
        output_type="latent",
    )
    options: dict[str, Any] = {"seed": 5, "cfg_scale": 2.0, **common, **LATENTS}
    torch.testing.assert_close(pipe(ip_adapter_image=each, **options), expected, atol=1e-4, rtol=0)
    embeds = pipe.prepare_ip_adapter_image_embeds(each)
    assert not any(tensor.is_inference() for tensor in embeds)  # a program may use them in training
    theirs = reference.prepare_ip_adapter_image_embeds(each, None, "cpu", 1)
    torch.testing.assert_close(embeds, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(pipe(ip_adapter_image_embeds=embeds, **options), expected, atol=1e-4, rtol=0)
    two: dict[str, Any] = options | {"prompt": ["a cat", "x"], "seed": [5, 6], "step_cache": 1e-6}
    rows = [each, [IMAGES[2], IMAGES[:2]]]
    for none in ({}, {"ip_adapter_image": None}):
        torch.testing.assert_close(pipe(image_prompt=rows, **none, **two)[:1], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(pipe(ip_adapter_image=each, **two)[:1], expected, atol=1e-4, rtol=0)
    wide = [torch.zeros(1, 1, 7)] * 2
    for arguments, message in (
        ({"image_prompt": IMAGES[0]}, "image_prompt: 1 images for 2 IP-Adapters; give one for each in their order"),
        ({"prompt": ["a", "b"], "image_prompt": [each, IMAGES[:2]]}, "must have the same number for each IP-Adapter"),
        ({"ip_adapter_image_embeds": embeds[:1]}, "ip_adapter_image_embeds: 1 tensors for 2 IP-Adapters"),
        ({"ip_adapter_image_embeds": wide}, r"\[1, 1, 7\]: must have the width of CLIP's embedding, 24"),
        ({"ip_adapter_image_embeds": [3, 4]}, "ip_adapter_image_embeds is a int: must be a tensor for each"),
        ({"ip_adapter_image_embeds": embeds, "image_prompt": each}, "are both given: leave one of them out"),
        ({"ip_adapter_image_embeds": embeds, "image_prompt_scale": 0.5}, "image_prompt_scale: is a weight of images"),
        ({"negative_ip_adapter_image": IMAGES[0]}, "a negative prompt has black images, leave it out"),
    ):
        with pytest.raises(InvalidSetting, match=message):
            pipe(**{"prompt": "x"} | arguments | SMALL)
    with pytest.raises(InvalidSetting, match="scale: 1 values for 2 IP-Adapters; give one for each"):
        pipe.set_ip_adapter_scale([0.5])
    with pytest.raises(InvalidSetting, match="scale = 'x': must be a finite number"):
        pipe.set_ip_adapter_scale([9.0, "x"])  # type: ignore[list-item]
    torch.testing.assert_close(pipe(ip_adapter_image=each, **options), expected, atol=1e-4, rtol=0)
    with pytest.raises(InvalidSetting, match="uri: 2 for 3 IP-Adapters; give one for each"):
        pipe.load_ip_adapter([adapter, adapter], [*names, "x"])
    pipe.unload_ip_adapter()
    with pytest.raises(InvalidSetting, match="an IP-Adapter reads them, and there is none"):
        pipe("x", ip_adapter_image_embeds=embeds, **SMALL)


def test_files_in_the_layouts_and_places_that_exist(
    reading: FluxImagePipeline, repository: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = reading("x", image_prompt=IMAGES[1], seed=1, **LATENTS)
    state = load_file(adapter / "ip_adapter.safetensors")
    renamed = {
        name.replace("ip_adapter_proj_model.", "image_proj.")
        .replace("double_blocks.", "ip_adapter.")
        .replace("processor.ip_adapter_double_stream_k_proj", "to_k_ip")
        .replace("processor.ip_adapter_double_stream_v_proj", "to_v_ip"): tensor
        for name, tensor in state.items()
    }
    save_file(renamed, tmp_path / "of_diffusers.safetensors")
    tower = load_file(adapter / "image_encoder/model.safetensors")
    whole = tower | {"text_model.x": torch.zeros(1), "text_projection.weight": torch.zeros(1), "logit_scale": tower[
        "visual_projection.weight"][0, :1].clone()}  # fmt: skip
    whole["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    (tmp_path / "clip").mkdir()
    save_file(whole, tmp_path / "clip/model.safetensors")
    (tmp_path / "clip/config.json").write_text('{"vision_config": {"num_attention_heads": 4}}')
    monkeypatch.setenv("FLUX_BATCH_CACHE", str(tmp_path / "cache"))
    there = f"memory://{uuid.uuid4().hex}"
    fsspec.filesystem("memory").put(f"{tmp_path}/", f"{there}/weights", recursive=True)
    reading.load_ip_adapter(
        there,
        weight_name="of_diffusers.safetensors",
        subfolder="weights",
        image_encoder_pretrained_model_name_or_path=f"{there}/weights",
        image_encoder_subfolder="clip",
    )
    torch.testing.assert_close(reading("x", image_prompt=IMAGES[1], seed=1, **LATENTS), expected, atol=1e-5, rtol=0)

    save_file({name: tensor.half() for name, tensor in renamed.items()}, tmp_path / "changed.safetensors")
    file = f"{there}/weights/of_diffusers.safetensors"
    fsspec.filesystem("memory").put(str(tmp_path / "changed.safetensors"), file)
    given: Any = {"uri": str(repository), "ip_adapter": {"uri": file, "image_encoder": f"{there}/weights/clip"}}
    for refresh in (False, True):
        read: Any = load_pipeline(ModelConfig(refresh=refresh, dtype="float32", **given), 0)
        found = dict(read.image_prompts.ip_adapters[0].adapter.named_parameters())
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items()) is not refresh


def test_what_cannot_be_loaded_is_said(pipe: FluxImagePipeline, adapter: Path, tmp_path: Path) -> None:
    instantx = {"image_proj.proj.0.weight": torch.zeros(4, 4), "ip_adapter.0.to_k_ip.weight": torch.zeros(4, 4)}
    save_file(instantx, tmp_path / "instantx.safetensors")
    save_file(adapter_state(TinyFlux(depth=1)), tmp_path / "short.safetensors")
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle/ip-adapter.bin").write_bytes(b"\x80\x02.")
    encoder = adapter / "image_encoder"
    for source, message in (
        (tmp_path / "instantx.safetensors", "is InstantX's IP-Adapter, which is not supported: use one of XLabs"),
        (tmp_path / "pickle", "is a pickle, as InstantX's IP-Adapter is"),
        (tmp_path / "pickle/ip-adapter.bin", "is a pickle, as InstantX's IP-Adapter is"),
        (tmp_path / "short.safetensors", "it has double blocks 1, where the others have 2"),
        (encoder / "model.safetensors", "does not hold an IP-Adapter of XLabs"),
    ):
        with pytest.raises(CheckpointError, match=message):
            pipe.load_ip_adapter(source, image_encoder=encoder)
    with pytest.raises(CheckpointError, match=r"no vision tower for an IP-Adapter: .* openai/clip-vit-large-patch14"):
        pipe.load_ip_adapter(tmp_path / "short.safetensors")
    with pytest.raises(InvalidSetting, match="there is no IP-Adapter"):
        pipe.set_ip_adapter_scale(0.5)


def test_settings_that_do_not_go_together_are_refused(reading: FluxImagePipeline, tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="scale: 3 values for 2 double blocks"):
        reading.set_ip_adapter_scale([1.0, 1.0, 1.0])
    with pytest.raises(InvalidSetting, match=r"a FLUX.1-Redux and an IP-Adapter would both read it"):
        reading.load_redux(make_tiny_redux(tmp_path))
    adapter = {"ip_adapter": {"uri": "a"}}
    with pytest.raises(JobError, match="cuda_graphs = True: a graph does not take the keys and values"):
        make_job(tmp_path, model={"uri": "demo", "cuda_graphs": True, **adapter})
    for wrong, message in (
        ({"uri": []}, "ip_adapter.uri: must be a path or an address, or a list of them"),
        (
            {"uri": ["a", "b"], "scale": [1.0]},
            "ip_adapter.scale: 1 values for 2 IP-Adapters; give one, or one for each",
        ),
        ({"uri": "a", "scale": "x"}, "ip_adapter.scale = 'x': must be a number, or a list of them"),
    ):
        with pytest.raises(JobError, match=message):
            make_job(tmp_path, model={"uri": "demo", "ip_adapter": wrong})
    with pytest.raises(JobError, match="ip_adapter: redux reads the image prompts of rows, too"):
        make_job(tmp_path, model={"uri": "demo", "redux": {"uri": "b"}, **adapter})


def test_rows_with_image_prompts(repository: Path, adapter: Path, tmp_path: Path) -> None:
    IMAGES[0].save(tmp_path / "0.png")
    rows: list[dict[str, Any]] = [
        {"prompt": "none", "image_prompt": None, "image_prompt_scale": None},
        {"prompt": "one", "image_prompt": ["0.png"], "image_prompt_scale": None},
        {"prompt": "two", "image_prompt": ["0.png", "0.png"], "image_prompt_scale": [1.0, 0.25]},
    ]
    several = {"uri": [str(adapter)] * 2, "scale": [0.5, 0.25]}
    model: dict[str, Any] = {"uri": str(repository), "dtype": "float32", "ip_adapter": several}
    sampling = {"width": 32, "height": 32, "num_inference_steps": 1, "t5_sequence_length": 16}
    config = make_job(tmp_path, rows, model=model, sampling=sampling, failures={"max_ratio": 1.0})
    report = run(config, engine=LocalEngine())

    found = metadata(config)
    assert [row["status"] for row in found] == ["success", "failed", "success"], found
    assert "image_prompt: 1 images for 2 IP-Adapters" in found[1]["error_message"]
    assert [row["image_prompt_scale"] for row in found] == [None, "1", "1, 0.25"]
    assert {row["embedded_guidance"] for row in found} == {3.5}
    assert report.model["ip_adapter"]["scale"] == [0.5, 0.25]
    numbers = sum(tensor.numel() for tensor in adapter_state(TinyFlux()).values())
    counted = memory(config)["bytes"]
    assert counted["ip_adapter"] == 2 * 4 * numbers
    one = make_job(tmp_path, rows, model=model | {"ip_adapter": {"uri": str(adapter)}}, sampling=sampling)
    assert memory(one)["bytes"] == counted | {"ip_adapter": 4 * numbers}
