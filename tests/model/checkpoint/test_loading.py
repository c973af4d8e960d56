"""Filling models with weights: layers that load themselves, and the memory of loading."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from flux_batch.model.autoencoder import AutoEncoder
from flux_batch.model.checkpoint.checkpoint import open_checkpoint
from flux_batch.model.checkpoint.detect import detect
from flux_batch.model.checkpoint.diffusers_keys import transformer_to_diffusers
from flux_batch.model.checkpoint.lazy_state import StoredState
from flux_batch.model.checkpoint.loading import for_device, load_transformer
from flux_batch.model.params import DEV, FluxParams
from flux_batch.model.transformer import Flux
from helpers.golden import AUTOENCODER, filled, tensor
from helpers.layout_files import AXES_DIM, LAYOUTS, State, coarse_state, state_on_meta
from helpers.sparse_files import sparse_gguf, sparse_safetensors

CPU = torch.device("cpu")
MIB = 2**20
# 71 MB in bf16, with a largest tensor of 3.7 MB. The heads are as in FLUX.1, so no config.json is needed.
PARAMS = replace(DEV, hidden_size=512, num_heads=4, mlp_hidden_dim=2048, depth=2, depth_single_blocks=4)


class Doubled(nn.Module):
    """A linear layer that loads its weight doubled, and records its name."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.shape = linear.weight.shape

    def load_from(self, state: StoredState, name: str) -> None:
        self.name, self.doubled = name, 2 * state[f"{name}.weight"]


def double_projections(model: nn.Module) -> None:
    for block in model.get_submodule("single_blocks"):
        block.linear2 = Doubled(block.linear2)


@pytest.mark.parametrize("layout", ["original fp32", "diffusers", "comfy_quant", "gguf F16"])
def test_layers_may_be_exchanged_before_they_are_filled(tmp_path: Path, layout: str) -> None:
    state = coarse_state()
    found, checkpoint = detect(open_checkpoint(LAYOUTS[layout].write(state, tmp_path / "model")))
    config = {"axes_dims_rope": AXES_DIM}
    model = load_transformer(checkpoint, found, config, dtype=torch.float32, device=CPU, prepare=double_projections)
    for i, block in enumerate(model.single_blocks):
        assert block.linear2.name == f"single_blocks.{i}.linear2"
        assert torch.equal(block.linear2.doubled, 2 * state[f"single_blocks.{i}.linear2.weight"])
    assert torch.equal(model.img_in.weight, state["img_in.weight"])
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.parameters())
    assert not model.training


# The stored types of tensors that are loaded as bfloat16.
def as_fp32(name: str, shape: tuple[int, ...]) -> str:
    return "F32"


def as_bf16(name: str, shape: tuple[int, ...]) -> str:
    return "BF16"


def as_fp8(name: str, shape: tuple[int, ...]) -> str:
    return "F8_E4M3" if len(shape) == 2 else "F32"


def as_q4_k(name: str, shape: tuple[int, ...]) -> str:
    return "Q4_K" if len(shape) == 2 and shape[-1] % 256 == 0 else "F32"


def shapes_of(params: FluxParams, rename: Callable[[State], State]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in rename(state_on_meta(lambda: Flux(params))).items()}


def write(folder: Path) -> dict[str, Path]:
    ours, theirs = shapes_of(PARAMS, dict), shapes_of(PARAMS, transformer_to_diffusers)

    def stored(shapes: dict[str, tuple[int, ...]], dtype: Callable[[str, tuple[int, ...]], str]):  # type: ignore[no-untyped-def]
        return {name: (dtype(name, shape), shape) for name, shape in shapes.items()}

    scales = {name.replace(".weight", ".scale_weight"): ("F32", ()) for name, x in ours.items() if len(x) == 2}
    return {
        "bf16": sparse_safetensors(folder / "bf16", stored(ours, as_bf16)),
        "fp32": sparse_safetensors(folder / "fp32", stored(ours, as_fp32)),
        "diffusers": sparse_safetensors(folder / "diffusers", stored(theirs, as_bf16)),
        "scaled fp8": sparse_safetensors(folder / "fp8", stored(ours, as_fp8) | scales),
        "gguf": sparse_gguf(folder / "gguf", stored(ours, as_q4_k)),
    }


# Prints, for each file, the private memory before, at its peak, and with the model loaded, in bytes.
MEASURE = """
import gc, json, sys, threading, time
import torch
from flux_batch.pipeline.model_manager import ModelManager

def private():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

def watch(peaks, done):
    while not done.is_set():
        peaks.append(private())
        time.sleep(0.001)

ModelManager(torch.bfloat16, "cpu", [sys.argv[1]])  # imports and sets up everything once
for path in sys.argv[2:]:
    gc.collect()
    before, peaks, done = private(), [], threading.Event()
    thread = threading.Thread(target=watch, args=(peaks, done))
    thread.start()
    manager = ModelManager(torch.bfloat16, "cpu", [path])
    done.set()
    thread.join()
    sys.stdout.write(json.dumps([before, max(peaks), private()]) + "\\n")
    del manager
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured by /proc")
def test_loading_takes_little_memory_beside_the_model(tmp_path: Path) -> None:
    files = write(tmp_path)
    tiny = LAYOUTS["gguf Q8_0"].write(coarse_state(), tmp_path / "tiny")
    # With a fixed threshold, freed memory goes back to the system at once and is not counted any more.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, str(tiny), *map(str, files.values())]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    shapes = shapes_of(PARAMS, dict).values()
    sizes = [2 * torch.Size(shape).numel() for shape in shapes]
    most = max(sizes) + sum(sizes) // 10
    for name, line in zip(files, result.stdout.splitlines(), strict=True):
        before, peak, after = json.loads(line)
        assert peak - after < most, f"{name}: {(peak - after) / MIB:.0f} MiB on the way"
        # A model stored in the wanted dtype only uses the pages of its file; a converted one is in memory once.
        kept = 0 if name == "bf16" else sum(sizes)
        assert after - before < kept + sum(sizes) // 10, f"{name}: {(after - before) / MIB:.0f} MiB kept"


def test_an_autoencoder_is_laid_out_for_the_tensor_cores_of_cuda_alone() -> None:
    plain = for_device(filled(AutoEncoder(AUTOENCODER)), CPU)
    model = for_device(filled(AutoEncoder(AUTOENCODER)), torch.device("cuda"))  # this does not move the weights
    formats = [each.decoder.conv_out.weight.is_contiguous(memory_format=torch.channels_last) for each in (plain, model)]
    assert formats == [False, True]
    latents = tensor("in.noise", (1, 16, 4, 6))
    torch.testing.assert_close(model.decode(latents), plain.decode(latents), rtol=0, atol=1e-4)


def test_an_autoencoder_laid_out_in_inference_mode_can_be_trained_through() -> None:
    model = filled(AutoEncoder(AUTOENCODER)).requires_grad_(False)
    with torch.inference_mode():
        for_device(model, torch.device("cuda"))
    latents = tensor("in.noise", (1, 16, 4, 6)).requires_grad_()
    model.decode(latents).sum().backward()
    assert latents.grad is not None
