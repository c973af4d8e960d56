"""The whole training with one or two steps per stage: it writes a model, and can stop between stages."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flux_batch.demo.paths import demo_model_folder
from flux_batch.demo.train import __main__ as program
from flux_batch.demo.train import autoencoder, flow
from flux_batch.demo.train.adapters import blueprint, canny, kontext
from flux_batch.demo.train.adapters.low_rank import LowRank, add_conditioning, add_low_rank, to_original, to_peft
from flux_batch.demo.train.autoencoder import fold_statistics, images, make_autoencoder
from flux_batch.demo.train.flow import initialise
from flux_batch.demo.train.latents import token_weights
from flux_batch.demo.train.parts import AUTOENCODER, TRANSFORMER
from flux_batch.demo.world.captions import Background, Scene, Thing
from flux_batch.model.conditions.variant import CANNY
from flux_batch.model.transformer import Flux
from flux_batch.pipeline.pipeline import FluxImagePipeline

CPU = torch.device("cpu")


def test_folding_makes_latents_standard_and_keeps_the_images() -> None:
    model = make_autoencoder(0).eval()
    image = images(random.Random(1), 2, 128)
    with torch.no_grad():
        before = model.decoder(model.encoder(image).chunk(2, dim=1)[0])
        fold_statistics(model, CPU, random.Random(2))
        means, logvar = model.encoder(images(random.Random(2), autoencoder.FOLD_IMAGES, 128)).chunk(2, dim=1)
        after = model.decode(model.encode(image))

    spread = AUTOENCODER.scale_factor * (means.var(dim=(0, 2, 3)) + logvar.exp().mean(dim=(0, 2, 3))).sqrt()
    assert (means.mean(dim=(0, 2, 3)) - AUTOENCODER.shift_factor).abs().max() < 1e-2
    assert (spread - 1).abs().max() < 1e-3
    # Except at the border, see fold_statistics; group norms carry a little of the difference inwards.
    inside = (after - before)[:, :, 32:-32, 32:-32].abs().mean()
    assert inside < 0.05 * before.std()


def test_an_untrained_transformer_predicts_zero() -> None:
    torch.manual_seed(0)
    model = initialise(Flux(TRANSFORMER))
    ids = torch.zeros(6, 3)
    made = model(
        torch.randn(1, 4, 64),
        torch.randn(1, 2, TRANSFORMER.context_in_dim),
        model.position_table(ids),
        torch.tensor([0.5]),
        torch.randn(1, TRANSFORMER.vec_in_dim),
        torch.tensor([3.5]),
    )

    assert not made.any()


def test_a_lora_has_the_names_of_diffusers_and_splits_fused_layers() -> None:
    torch.manual_seed(0)
    layers = add_low_rank(Flux(TRANSFORMER), blueprint.LAYERS, rank=4)
    for layer in layers.values():
        assert isinstance(layer, LowRank)
        layer.up.data.normal_()
    tensors = to_peft(layers)

    def delta(name: str) -> torch.Tensor:
        return tensors[f"transformer.{name}.lora_B.weight"] @ tensors[f"transformer.{name}.lora_A.weight"]

    fused = layers["single_blocks/0/linear1"]
    assert isinstance(fused, LowRank)
    parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    whole = torch.cat([delta(f"single_transformer_blocks.0.{part}") for part in parts])
    assert torch.allclose(whole, fused.up @ fused.down)
    assert delta("transformer_blocks.0.attn.to_out.0").shape == (256, 256)
    assert delta("single_transformer_blocks.3.proj_out").shape == (256, 1280)


def test_a_lora_of_a_condition_has_the_names_of_the_original_with_biases_and_norms() -> None:
    tensors = to_original(add_conditioning(Flux(TRANSFORMER), rank=4))

    assert tensors["single_blocks.4.linear1.lora_A.weight"].shape == (4, 256)
    assert tensors["double_blocks.0.txt_mlp.2.lora_B.bias"].shape == (256,)
    assert tensors["double_blocks.0.img_attn.norm.key_norm.scale"].shape == (128,)
    assert not any("mod" in name for name in tensors)


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoencoder, "FOLD_IMAGES", 8)
    monkeypatch.setattr(flow, "TOKENS_A_STEP", 4 * 64)
    monkeypatch.setattr(blueprint, "NUM_IMAGES", 8)
    monkeypatch.setattr(canny, "NUM_IMAGES", 4)
    monkeypatch.setattr(canny, "IMAGES_A_STEP", 2)
    monkeypatch.setattr(kontext, "NUM_SCENES", 2)
    monkeypatch.setattr(kontext, "IMAGES_A_STEP", 2)


def test_training_resumes_and_writes_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*more: str) -> None:
        counts = {"autoencoder-steps": 2, "text-steps": 1, "images": 16, "flow-steps": 2}
        counts |= {f"{name}-steps": 1 for name in ("blueprint", "canny", "kontext")}
        words = [word for name, count in counts.items() for word in (f"--{name}", str(count))]
        monkeypatch.setattr(sys, "argv", ["train", str(tmp_path / "work"), "--device", "cpu", *words, *more])
        program.main()

    train()
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("*.pt")}
    train("--to", str(tmp_path / "model"))

    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("*.pt")} == kept
    pipe = FluxImagePipeline.from_pretrained(str(tmp_path / "model"), torch_dtype=torch.float32, device="cpu")
    image = pipe(prompt="a star", width=64, height=64, num_inference_steps=1, seed=0, t5_sequence_length=16)
    assert image.size == (64, 64)
    # Its input is as wide as noise and a control image, so the pipeline treats it as Canny.
    pipe.set_loras([(tmp_path / "flux-canny.safetensors", 1.0), (tmp_path / "blueprint.safetensors", 1.0)])
    assert pipe.variant is CANNY
    pipe.set_loras([(tmp_path / "flux-kontext.safetensors", 1.0)])


def test_training_goes_on_from_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--device", "cpu", "--images", "16", "--flow-steps", "1", "--loras", "--start"]
    to = tmp_path / "model"
    monkeypatch.setattr(sys, "argv", ["train", str(tmp_path), *words, str(demo_model_folder()), "--to", str(to)])
    program.main()
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {to}"

    def weights(folder: Path) -> dict[str, torch.Tensor]:
        return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")

    before, after = weights(demo_model_folder()), weights(to)
    assert all(torch.allclose(before[name].float(), after[name].float(), atol=0.05) for name in before)
    assert not all(torch.equal(before[name], after[name]) for name in before)
    assert (to / "tokenizer_2" / "spiece.model").is_file()


def test_tokens_under_a_thing_count_more() -> None:
    scene = Scene(
        first=Thing(shape="star", colour="red", size="small"),
        position="top left",
        background=Background(texture="plain", colour="white"),
    )

    weights = token_weights(scene, 128, 128, 4.0).reshape(8, 8)

    assert (weights[1:3, 1:3] == 4).all()
    assert (weights[4:] == 1).all()
    assert (weights[:, 4:] == 1).all()
