"""Estimated bytes of weights compared with real models, and of activations with live tensors."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flux_batch.model.autoencoder import AutoEncoder
from flux_batch.model.checkpoint.diffusers_keys import autoencoder_to_diffusers, transformer_to_diffusers
from flux_batch.model.footprint import decode_bytes, denoise_bytes, is_quantizable, weight_bytes
from flux_batch.model.optimize import quantize
from flux_batch.model.optimize.quantize import Fp8Linear, apply_fp8, apply_fp8_to_t5
from flux_batch.model.params import AUTOENCODER, DEV, SCHNELL, Shapes
from flux_batch.model.text.t5 import T5Model, T5Params
from flux_batch.model.transformer import Denoiser, Flux, PromptEmbeds
from flux_batch.pipeline.model_manager import PREPARE_T5, PREPARE_TRANSFORMER
from flux_batch.sampling_params import Quantization

pytestmark = pytest.mark.slow

META = torch.device("meta")
# As wide as FLUX.1, with only a few of its equal blocks.
SHORT = replace(DEV, depth=2, depth_single_blocks=3)
T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "feed_forward_proj": "gated-gelu",
}


def on_meta(make: Any, dtype: torch.dtype = torch.float32) -> Any:
    with META:
        return make().to(dtype).requires_grad_(False)


def shapes_of(model: nn.Module) -> Shapes:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def bytes_of(model: nn.Module) -> int:
    return sum(value.nbytes for value in [*model.parameters(), *model.buffers()])


def test_dev_has_the_parameters_that_are_published() -> None:
    shapes = shapes_of(on_meta(lambda: Flux(DEV)))
    assert weight_bytes("transformer", shapes, "bfloat16", "none") == 2 * 11_901_408_320
    assert weight_bytes("transformer", shapes, "float32", "none") == 4 * 11_901_408_320
    schnell = shapes_of(on_meta(lambda: Flux(SCHNELL)))
    assert weight_bytes("transformer", schnell, "float16", "none") == 2 * 11_891_178_560


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("quantization", PREPARE_TRANSFORMER)
def test_a_transformer_takes_what_is_counted(dtype: str, quantization: Quantization) -> None:
    model = on_meta(lambda: Flux(SHORT), getattr(torch, dtype))
    shapes = shapes_of(model)
    diffusers = {name: tuple(value.shape) for name, value in transformer_to_diffusers(model.state_dict()).items()}
    if change := PREPARE_TRANSFORMER[quantization]:
        change(model)
    counted = weight_bytes("transformer", shapes, dtype, quantization)
    assert counted == bytes_of(model)
    assert weight_bytes("transformer", diffusers, dtype, quantization) == counted


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("quantization", PREPARE_T5)
def test_a_t5_takes_what_is_counted(dtype: str, quantization: Quantization) -> None:
    is_published = (quantization, dtype) == ("none", "bfloat16")
    num_layers = T5_XXL["num_layers"] if is_published else 2
    model = on_meta(lambda: T5Model(T5Params(**T5_XXL | {"num_layers": num_layers})), getattr(torch, dtype))
    if dtype == "float16":  # as load_t5 does
        for name, module in model.named_modules():
            if name.endswith(".wo"):
                module.to(torch.float32)
    shapes = shapes_of(model)
    shapes |= {"encoder.embed_tokens.weight": shapes["shared.weight"]}  # some files have this key too
    if change := PREPARE_T5[quantization]:
        change(model)
    assert weight_bytes("t5", shapes, dtype, quantization) == bytes_of(model)
    if is_published:
        assert bytes_of(model) == 2 * 4_762_310_656


def test_what_is_counted_as_fp8_is_what_becomes_fp8() -> None:
    for part, model, change in (
        ("transformer", on_meta(lambda: Flux(SHORT)), apply_fp8),
        ("t5", on_meta(lambda: T5Model(T5Params(**T5_XXL | {"num_layers": 2}))), apply_fp8_to_t5),
    ):
        counted = {name for name, shape in shapes_of(model).items() if is_quantizable(part, name, len(shape))}
        change(model)
        layers = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
        assert counted == layers


def test_the_autoencoder_is_no_narrower_than_float32_in_float16() -> None:
    model = on_meta(lambda: AutoEncoder(AUTOENCODER))
    counts = {dtype: weight_bytes("autoencoder", shapes_of(model), dtype, "fp8") for dtype in DTYPES}
    assert counts == {"bfloat16": 2 * 83_819_683, "float16": 4 * 83_819_683, "float32": 4 * 83_819_683}


DTYPES = ("bfloat16", "float16", "float32")


class Alive(TorchDispatchMode):
    """Counts the bytes of live tensors made in a block, and their peak."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.peak = self.now = 0
        weights = [value for model in models for value in [*model.parameters(), *model.buffers()]]
        self._kept = [value.untyped_storage() for value in weights]
        self._known: dict[int, Any] = {storage._cdata: None for storage in self._kept}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def freed(_: object) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
        self.now += size


@pytest.fixture
def _fused_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """On meta, attention would use the full matrix of scores, which no GPU does."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: torch.empty_like(q))


@pytest.fixture
def _products_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On meta, rows are converted to fp8 in one step, and the fake operation computes products."""

    def to_fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.empty((len(rows), 1), dtype=torch.float32, device=rows.device)
        return (rows / scale).to(quantize.E4M3), scale

    monkeypatch.setattr(quantize, "to_fp8", to_fp8)
    monkeypatch.setattr(
        quantize,
        "fp8_matmul",
        lambda a, _, b, *rest: torch.empty(len(a), len(b), dtype=torch.bfloat16, device=a.device),
    )


@pytest.mark.usefixtures("_fused_attention", "_products_as_on_a_gpu")
@pytest.mark.parametrize(
    ("dtype", "quantization", "batch_size"),
    [
        ("bfloat16", "none", 2),
        ("bfloat16", "fp8", 1),
        ("bfloat16", "fp8_matmul", 2),
        ("float32", "fp8", 1),
        ("float32", "bfloat16", 1),
    ],
)
def test_denoising_holds_what_is_counted(dtype: str, quantization: Quantization, batch_size: int) -> None:
    kind, num_txt, num_img = getattr(torch, dtype), 512, 4096
    model = on_meta(lambda: Flux(SHORT), kind)
    shapes = shapes_of(model)
    if change := PREPARE_TRANSFORMER[quantization]:
        change(model)
    alive = Alive(model)
    with torch.no_grad(), META, alive:
        text = PromptEmbeds(
            torch.empty((batch_size, num_txt, 4096), dtype=kind), torch.empty((batch_size, 768), dtype=kind)
        )
        pe, steps = torch.empty((num_txt + num_img, 64, 2)), torch.empty(50, dtype=kind)
        velocity = Denoiser(model, text, pe, steps, torch.empty(batch_size, dtype=kind))
        for step in range(2):
            velocity(step, torch.empty((batch_size, num_img, 64), dtype=kind))
    counted = denoise_bytes(shapes, num_txt + num_img, batch_size, dtype, quantization)
    assert alive.peak == pytest.approx(counted, rel=0.03)


@pytest.mark.usefixtures("_fused_attention")
@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", (128, 96)), ("float32", (64, 64))])
def test_decoding_holds_what_is_counted(dtype: str, size: tuple[int, int]) -> None:
    height, width = size
    model = on_meta(lambda: AutoEncoder(AUTOENCODER), getattr(torch, dtype))
    alive = Alive(model)
    with torch.no_grad(), META, alive:
        model.decode(torch.empty((3, 16, height, width), dtype=getattr(torch, dtype)))
    original = shapes_of(model)
    diffusers = {name: tuple(value.shape) for name, value in autoencoder_to_diffusers(model.state_dict()).items()}
    counted = decode_bytes(original, 8 * width, 8 * height, 3, dtype)
    assert alive.peak == pytest.approx(counted, rel=0.03)
    assert decode_bytes(diffusers, 8 * width, 8 * height, 3, dtype) == counted
