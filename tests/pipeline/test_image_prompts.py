"""Image prompts with ControlNets, the files of a ModelManager, speed-ups, and a job with both."""

from __future__ import annotations

import io
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from diffusers import FluxFillPipeline, FluxKontextPipeline
from PIL import Image

from flux_batch import FluxImagePipeline, ModelManager
from flux_batch.config.schema import JobConfig
from flux_batch.engine.local import LocalEngine
from flux_batch.errors import CheckpointError, InvalidSetting
from flux_batch.job import run
from flux_batch.model.optimize.cuda_graphs import CudaGraphs
from helpers.graph_recorder import GraphRecorder
from helpers.hub_server import Hub
from helpers.job_files import data_files, make_job, metadata
from helpers.parity import load_reference, reference_latents
from helpers.s3 import S3Server
from helpers.tiny_calls import CPU, SMALL, noise_image
from helpers.tiny_controlnet import BASE, make_net, reference_of
from helpers.tiny_flux import make_tiny_repository
from helpers.tiny_ip_adapter import load_into, make_tiny_ip_adapter
from helpers.tiny_redux import load_prior, make_tiny_redux
from helpers.web_server import web_server

# A deprecation warning of diffusers about its own class.
pytestmark = pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning")
READERS = ("redux", "ip_adapter")
CONTROL, PROMPT = noise_image(96, 64), noise_image(60, 40)
LATENTS = {"output_type": "latent", **SMALL}
CFG = {"cfg_scale": 2.0, "negative_prompt": "blurry"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a ControlNet, a Redux and an IP-Adapter."""
    folder = tmp_path_factory.mktemp("files")
    make_tiny_repository(folder / "dev", BASE)
    make_net(folder / "net", 2, 1)
    make_tiny_redux(folder / "redux")
    make_tiny_ip_adapter(folder / "ip_adapter", BASE)
    return folder


def reading(files: Path, reader: str, *, with_net: bool = False, **options: Any) -> FluxImagePipeline:
    """Load the model with a reader of image prompts."""
    nets = [files / "net"] if with_net else []
    pipe = FluxImagePipeline.from_pretrained(files / "dev", controlnets=nets, **CPU, **options)
    getattr(pipe, f"load_{reader}")(files / reader)
    return pipe


@pytest.mark.parametrize("reader", READERS)
def test_a_reader_goes_with_a_net(files: Path, reader: str) -> None:
    """The net reads the tokens of Redux after those of the text, but not those of an IP-Adapter.

    With Redux and a negative prompt, diffusers fails: it uses the positions of the longer text for both.
    """
    reference = reference_of(files / "dev", files / "net")
    theirs: dict[str, Any] = {"prompt": "a cat"}
    if reader == "redux":
        embeds = load_prior(files / "redux", reference)(PROMPT, prompt="a cat")
        theirs = {"prompt_embeds": embeds.prompt_embeds, "pooled_prompt_embeds": embeds.pooled_prompt_embeds}
        theirs |= {"guidance_scale": 2.5}
    else:
        load_into(reference, files / "ip_adapter")
        theirs |= {"ip_adapter_image": PROMPT, "guidance_scale": 3.5}
        theirs |= {"true_cfg_scale": 2.0, "negative_prompt": "blurry"}
    noise = torch.randn((1, 16, 8, 12), generator=torch.Generator().manual_seed(5))
    expected = reference_latents(
        reference,
        64,
        96,
        **theirs,
        latents=reference._pack_latents(noise, 1, 16, 8, 12),
        control_image=CONTROL,
        controlnet_conditioning_scale=0.6,
        control_guidance_end=0.7,
        num_inference_steps=3,
        output_type="latent",
    )
    settings: dict[str, Any] = {"controlnet_conditioning_scale": 0.6, "control_guidance_end": 0.7, **LATENTS}
    settings |= CFG if reader == "ip_adapter" else {}
    pipe = reading(files, reader, with_net=True)
    inputs = {"image_prompt": [[PROMPT], [CONTROL]], "control_image": [CONTROL, PROMPT]}
    found = pipe(["a cat", "x"], **inputs, seed=[5, 6], step_cache=1e-9, **settings)
    torch.testing.assert_close(found[:1], expected, atol=1e-4, rtol=0)


def test_an_ip_adapter_goes_with_kontext(files: Path) -> None:
    peer = load_into(load_reference(files / "dev", FluxKontextPipeline), files / "ip_adapter")
    expected = reference_latents(
        peer,
        64,
        96,
        prompt="a cat",
        image=CONTROL,
        ip_adapter_image=PROMPT,
        negative_prompt="blurry",
        true_cfg_scale=2.0,
        guidance_scale=2.5,
        max_area=64 * 96,
        _auto_resize=False,
        generator=torch.Generator("cpu").manual_seed(5),
        num_inference_steps=3,
        output_type="latent",
    )
    pipe = reading(files, "ip_adapter", variant="kontext")
    inputs: dict[str, Any] = {"reference_image": CONTROL, "resize_references": False, "image_prompt": PROMPT}
    torch.testing.assert_close(pipe("a cat", seed=5, **inputs, **CFG, **LATENTS), expected, atol=1e-4, rtol=0)


def test_a_redux_goes_with_fill(files: Path, tmp_path: Path) -> None:
    fill = make_tiny_repository(tmp_path / "fill", replace(BASE, in_channels=384))
    peer = load_reference(fill, FluxFillPipeline)
    embeds = load_prior(files / "redux", peer)(PROMPT, prompt="a cat")
    mask = Image.new("L", (96, 64))
    mask.paste(255, (10, 5, 60, 41))
    pipe = FluxImagePipeline.from_pretrained(fill, **CPU)
    pipe.load_redux(files / "redux")
    for conv in (peer.vae.encoder.conv_out, pipe.autoencoder.encoder.conv_out):  # samples equal means
        with torch.no_grad():
            conv.weight[16:], conv.bias[16:] = 0, -60.0
    expected = reference_latents(
        peer,
        64,
        96,
        prompt_embeds=embeds.prompt_embeds,
        pooled_prompt_embeds=embeds.pooled_prompt_embeds,
        image=CONTROL,
        mask_image=mask,
        generator=torch.Generator("cpu").manual_seed(5),
        num_inference_steps=3,
        output_type="latent",
    )
    assert pipe.default_guidance == 30
    found = pipe("a cat", input_image=CONTROL, mask_image=mask, image_prompt=PROMPT, seed=5, **LATENTS)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_rows_with_both(files: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "both", "control_image": "control.png", "image_prompt": "prompt.png"},
        {"prompt": "net", "control_image": "control.png", "image_prompt": None},
        {"prompt": "neither", "control_image": None, "image_prompt": "prompt.png"},
    ]
    sampling = {"width": 96, "height": 64, "num_inference_steps": 2, "t5_sequence_length": 16}
    for reader in READERS:
        model = {"uri": str(files / "dev"), "dtype": "float32", reader: {"uri": str(files / reader)}}
        model["controlnets"] = [{"uri": str(files / "net"), "scale": 0.8}]
        config = make_job(tmp_path / reader, rows, model=model, sampling=sampling, failures={"max_ratio": 1.0})
        PROMPT.save(tmp_path / reader / "prompt.png")
        CONTROL.save(tmp_path / reader / "control.png")
        run(config, engine=LocalEngine())
        found = metadata(config)
        assert [row["status"] for row in found] == ["success", "success", "failed"], [
            row["error_message"] for row in found
        ]
        assert [row["image_prompt"] for row in found[:2]] == ["prompt.png", None]
        assert "control_image is missing" in found[2]["error_message"]


def test_a_job_has_its_parts_from_a_bucket_a_hub_and_the_web(
    files: Path, tmp_path: Path, moto: S3Server, hub: Hub
) -> None:
    bucket = moto.make_bucket()
    fs, root = fsspec.url_to_fs(bucket, **moto.storage_options)
    for source in ("net", "ip_adapter/image_encoder"):
        fs.put(str(files / source), f"{root}/{source}", recursive=True)
    redux = {path.relative_to(files / "redux").as_posix(): path.read_bytes() for path in (files / "redux").rglob("*.*")}
    hub.repositories = {"owner/redux": redux, "owner/net": {"net.safetensors": weights(files / "net")}}
    row = {"prompt": "x", "control_image": "a.png", "image_prompt": "a.png", "seed": 1}
    sampling = {"width": 32, "height": 32, "num_inference_steps": 1, "t5_sequence_length": 16}
    with web_server() as web:
        adapter = web.at("/ip_adapter.safetensors", (files / "ip_adapter/ip_adapter.safetensors").read_bytes())
        tower = f"{bucket}/ip_adapter/image_encoder"
        for net, parts in (
            (f"{bucket}/net", {"redux": {"uri": "hf://owner/redux"}}),
            ("hf://owner/net", {"ip_adapter": {"uri": adapter, "image_encoder": tower}}),
        ):
            reader = next(iter(parts))
            model: dict[str, Any] = {"uri": str(files / "dev"), "dtype": "float32"}
            here = make_job(
                tmp_path / f"{reader} here",
                [row],
                model=model | {"controlnets": [{"uri": str(files / "net")}], reader: {"uri": str(files / reader)}},
                sampling=sampling,
            )
            away = make_job(
                tmp_path / f"{reader} away",
                [row],
                model=model | {"controlnets": [{"uri": net}], "storage_options": moto.storage_options, **parts},
                sampling=sampling,
            )
            for config in (here, away):
                CONTROL.save(Path(config.prompts.uri[0]).with_name("a.png"))
                run(config, engine=LocalEngine())
            assert image_of(away).tobytes() == image_of(here).tobytes()


def weights(folder: Path) -> bytes:
    return (folder / "diffusion_pytorch_model.safetensors").read_bytes()


def image_of(config: JobConfig) -> Image.Image:
    """Return the image of a run of one row."""
    shard = next(data for name, data in data_files(Path(config.output.uri)).items() if name.endswith(".tar"))
    with tarfile.open(fileobj=io.BytesIO(shard)) as tar:
        image = next(member for member in tar if member.name.endswith(".png"))
        return Image.open(tar.extractfile(image)).convert("RGB")  # type: ignore[arg-type]


@pytest.mark.parametrize("reader", READERS)
def test_speed_ups_hold(files: Path, reader: str) -> None:
    expected = reading(files, reader)("x", image_prompt=PROMPT, seed=1, **LATENTS)
    pipe = reading(files, reader, quantization="fp8")
    found = pipe("x", image_prompt=PROMPT, seed=1, tiled=True, **LATENTS)
    prompts = pipe.image_prompts
    parts = (prompts.redux.redux, prompts.redux.encoder.model) if prompts.redux else ()
    for each in prompts.ip_adapters:
        parts = each.adapter, each.encoder.model
    assert {weight.dtype for part in parts for weight in part.parameters()} == {torch.float32}
    assert 0 < (found - expected).abs().max() < 0.3
    torch.testing.assert_close(pipe("x", image_prompt=PROMPT, seed=1, step_cache=1e-9, **LATENTS), found)
    if reader == "redux":  # an IP-Adapter cannot be combined with graphs
        pipe.graphs = CudaGraphs(pipe.transformer, GraphRecorder())
        torch.testing.assert_close(pipe("x", image_prompt=PROMPT, seed=1, **LATENTS), found)


def manager_of(files: Path, *others: Any) -> ModelManager:
    manager = ModelManager(torch.float32, "cpu")
    parts = ("text_encoder", "text_encoder_2", "vae", "transformer")
    manager.load_models([*others, *(files / "dev" / part for part in parts)])
    return manager


@pytest.mark.parametrize(
    ("reader", "entries"),
    [
        ("redux", ["redux"]),
        ("ip_adapter", ["ip_adapter/ip_adapter.safetensors", "tower/image_encoder"]),
    ],
)
def test_a_manager_takes_the_files_of_readers(files: Path, reader: str, entries: list[str]) -> None:
    if not (files / "tower").exists():
        shutil.copytree(files / "ip_adapter/image_encoder", files / "tower/image_encoder")
    manager = manager_of(files, files / "net", *(files / entry for entry in entries))
    pipe = FluxImagePipeline.from_model_manager(manager)
    inputs: dict[str, Any] = {"control_image": CONTROL, "seed": 3, **LATENTS}
    scale = 1.0 if reader == "redux" else 0.5
    expected = reading(files, reader, with_net=True)("x", image_prompt=PROMPT, image_prompt_scale=scale, **inputs)
    of_diffsynth: dict[str, Any] = {
        "redux": {"flux_redux_image": PROMPT},
        "ip_adapter": {"ipadapter_images": [PROMPT], "ipadapter_scale": 0.5},
    }
    torch.testing.assert_close(pipe("x", **of_diffsynth[reader], **inputs), expected, atol=0, rtol=0)


def test_files_of_readers_that_do_not_fit_are_refused(files: Path, tmp_path: Path) -> None:
    manager = manager_of(files, files / "ip_adapter/image_encoder")
    with pytest.raises(CheckpointError, match=r"image_encoder is the vision tower of a CLIP, which is read for an IP-"):
        FluxImagePipeline.from_model_manager(manager)
    manager.load_models([files / "ip_adapter"])
    with pytest.raises(InvalidSetting, match="cuda_graphs = True: a graph does not take the keys and values of an IP-"):
        FluxImagePipeline.from_model_manager(manager, cuda_graphs=True)
    manager.load_models([files / "redux"])
    with pytest.raises(InvalidSetting, match=r"a FLUX.1-Redux and an IP-Adapter would both read it"):
        FluxImagePipeline.from_model_manager(manager)
    alone = shutil.copy(files / "redux/image_embedder/diffusion_pytorch_model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match=r"no vision tower for FLUX.1-Redux"):
        FluxImagePipeline.from_model_manager(manager_of(files, alone))
    with pytest.raises(CheckpointError, match=r"image_embedder and .* are both FLUX.1-Redux: leave one of them out"):
        FluxImagePipeline.from_model_manager(manager_of(files, files / "redux", alone))
    (tmp_path / "ip-adapter.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(CheckpointError, match=r"ip-adapter.bin is a pickle"):
        manager.load_models([tmp_path / "ip-adapter.bin"])
