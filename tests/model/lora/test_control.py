"""BFL's control LoRAs: replaced norms, a widened `img_in`, biases, and unloading bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from flux_batch import FluxImagePipeline
from flux_batch.errors import CheckpointError, InvalidSetting
from flux_batch.model.checkpoint.diffusers_keys import transformer_from_diffusers
from helpers.tiny_calls import CPU, SMALL, noise_image
from helpers.tiny_flux import TinyFlux, make_tiny_repository, read_folder

SCALE = 0.85


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_repository(tmp_path_factory.mktemp("control") / "flux1-dev", TinyFlux(depth=1, num_heads=3))


def control_lora(state: dict[str, Tensor], path: Path, seed: int = 0) -> dict[str, Tensor]:
    """Write a LoRA with the keys of flux1-canny-dev-lora.safetensors for a transformer."""
    random = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        stem, _, kind = name.rpartition(".")
        if kind == "scale":
            tensors[name] = torch.rand(value.shape, generator=random)
        elif kind == "weight":
            rows, columns = len(value), 128 if stem == "img_in" else value.shape[1]
            tensors[f"{stem}.lora_A.weight"] = 0.1 * torch.randn(4, columns, generator=random)
            tensors[f"{stem}.lora_B.weight"] = 0.1 * torch.randn(rows, 4, generator=random)
            tensors[f"{stem}.lora_B.bias"] = 0.1 * torch.randn(rows, generator=random)
    save_file(tensors, path)
    return tensors


def merged(state: dict[str, Tensor], lora: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return W' = pad(W) + s B A, b' = b + s bias_B, and the norms, computed independently of the code."""
    found = {name: value.double() for name, value in state.items()}
    found["img_in.weight"] = torch.cat((found["img_in.weight"], torch.zeros(len(state["img_in.weight"]), 64)), dim=1)
    for name, value in lora.items():
        stem, _, kind = name.partition(".lora_")
        if kind == "A.weight":
            found[f"{stem}.weight"] = (
                found[f"{stem}.weight"] + SCALE * lora[f"{stem}.lora_B.weight"].double() @ value.double()
            )
        elif kind == "B.bias":
            found[f"{stem}.bias"] = found[f"{stem}.bias"] + SCALE * value
        elif not kind:
            found[name] = value
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_control_lora_is_merged_and_taken_out_again(folder: Path, tmp_path: Path, dtype: str) -> None:
    pipe = FluxImagePipeline.from_pretrained(folder, dtype, "cpu")
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    path = tmp_path / "flux1-depth-dev-lora.safetensors"
    expected = merged(before, control_lora(before, path))
    assert pipe.needed_images == ()

    pipe.set_loras([(path, SCALE)])

    found = pipe.transformer.state_dict()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if name.endswith("norm.scale"):
            assert torch.equal(value, expected[name].to(value.dtype)), name
        torch.testing.assert_close(
            value, expected[name].to(value.dtype), atol=1e-6, rtol=1e-2 if dtype != "float32" else 0
        )
    assert (pipe.needed_images, pipe.default_guidance) == (("control_image",), 10.0)
    image = noise_image(96, 64)
    with pytest.raises(InvalidSetting, match="control_image is missing: FLUX"):
        pipe("x", **SMALL)
    common: dict[str, Any] = {"seed": 1, "output_type": "latent", **SMALL}
    one, other = (pipe("x", control_image=each, **common) for each in (image, image.rotate(9)))
    assert not torch.equal(one, other)

    pipe.unload_loras()

    after = pipe.transformer.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert (pipe.needed_images, pipe.default_guidance) == ((), 3.5)


def test_the_name_of_its_folder_tells_depth_from_canny(folder: Path, tmp_path: Path) -> None:
    pipe = FluxImagePipeline.from_pretrained(folder, **CPU)
    home = tmp_path / "flux-canny-project"
    control = home / "FLUX.1-Depth-dev-lora" / "pytorch_lora_weights.safetensors"
    control.parent.mkdir(parents=True)
    control_lora(pipe.transformer.state_dict(), control)
    save_file({"img_in.lora_A.weight": torch.ones(1, 64), "img_in.lora_B.weight": torch.ones(48, 1)}, home / "style")
    for uri in (control, control.parent, f"{control.parent}/"):
        pipe.set_loras([(uri, 1.0)])
        assert pipe.default_guidance == 10.0
        pipe.set_loras([(home / "style", 1.0), (uri, 1.0)])
        assert pipe.default_guidance == 10.0  # the names of other LoRAs do not matter
    named = control.rename(home / "flux1-depth.safetensors")
    pipe.set_loras([(home / "style", 1.0), (named, 1.0)])
    assert pipe.default_guidance == 10.0


def test_other_loras_of_img_in_change_the_columns_of_the_noise(folder: Path, tmp_path: Path) -> None:
    pipe = FluxImagePipeline.from_pretrained(folder, **CPU)
    control, style = tmp_path / "flux1-canny-dev-lora.safetensors", tmp_path / "style.safetensors"
    control_lora(pipe.transformer.state_dict(), control)
    down, up = torch.randn(2, 64), torch.randn(48, 2)
    save_file({"img_in.lora_A.weight": down, "img_in.lora_B.weight": up}, style)
    pipe.set_loras([(control, 1.0)])
    alone = pipe.transformer.img_in.weight.clone()

    pipe.load_lora(style)

    change = pipe.transformer.img_in.weight - alone
    torch.testing.assert_close(change[:, :64], up @ down, atol=1e-5, rtol=0)
    assert not change[:, 64:].any()


def test_the_keys_of_diffusers(folder: Path, tmp_path: Path) -> None:
    """Files as from diffusers' trainer of control LoRAs: norms, and separate changes of layers that we fuse."""
    pipe = FluxImagePipeline.from_pretrained(folder, **CPU)
    state = read_folder(folder / "transformer")
    random = torch.Generator().manual_seed(2)
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        stem, _, _ = name.rpartition(".")
        if ".attn.norm_" in name:
            tensors[f"transformer.{name}"] = state[name] = torch.rand(value.shape, generator=random)
        elif value.ndim == 2:
            wide = F.pad(value, (0, 64)) if stem == "x_embedder" else value
            down, up = torch.randn(2, wide.shape[1], generator=random), torch.randn(len(value), 2, generator=random)
            tensors |= {f"transformer.{stem}.lora_A.weight": down, f"transformer.{stem}.lora_B.weight": up}
            state[name] = wide + up @ down
    save_file(tensors, tmp_path / "flux-canny-lora.safetensors")

    pipe.load_lora(tmp_path / "flux-canny-lora.safetensors")

    expected = transformer_from_diffusers(state)
    for name, found in pipe.transformer.state_dict().items():
        torch.testing.assert_close(found, expected[name], atol=1e-5, rtol=0)
    assert pipe.needed_images == ("control_image",)


def test_two_control_loras_are_refused(folder: Path, tmp_path: Path) -> None:
    pipe = FluxImagePipeline.from_pretrained(folder, **CPU)
    before: Any = pipe.transformer.img_in.weight.clone()
    paths = [tmp_path / name for name in ("canny.safetensors", "depth.safetensors")]
    for seed, path in enumerate(paths):
        control_lora(pipe.transformer.state_dict(), path, seed)
    with pytest.raises(CheckpointError, match=r"two control LoRAs both set .*norm: use one at a time"):
        pipe.set_loras([(path, 1.0) for path in paths])
    assert torch.equal(pipe.transformer.img_in.weight, before)
