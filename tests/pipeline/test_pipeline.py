"""The pipeline with tiny random models: repeatable images, texts, and its public behaviour."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flux_batch import FluxImagePipeline, ModelManager
from flux_batch.errors import CheckpointError, InvalidSetting, OutOfMemory, RowError
from flux_batch.model.optimize.cuda_graphs import CudaGraphs
from flux_batch.model.text import clip, t5
from flux_batch.pipeline import pipeline as pipeline_module
from helpers import tiny_flux
from helpers.graph_recorder import GraphRecorder
from helpers.tiny_calls import CPU, PROMPTS, SEEDS, SMALL, noise_image
from helpers.tiny_flux import CLIP_WIDTH, T5_WIDTH, TinyFlux, copy_repository, make_tiny_repository


def with_graphs(pipe: FluxImagePipeline, recorder: GraphRecorder) -> FluxImagePipeline:
    """Return a pipeline of the same parts that records the steps of its transformer."""
    parts = pipe.transformer, pipe.autoencoder, pipe.clip, pipe.t5, pipe.schedule
    return FluxImagePipeline(*parts, graphs=CudaGraphs(pipe.transformer, recorder))


def assert_within_one_level(image: Image.Image, expected: Image.Image) -> None:
    assert image.size == expected.size
    assert image.mode == expected.mode == "RGB"
    difference = np.abs(np.asarray(image, dtype=int) - np.asarray(expected, dtype=int))
    assert difference.max() <= 1


def test_what_compiles_in_another_thread_has_the_options_of_compiling(
    pipe: FluxImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch keeps these options per thread, but an engine may load in one thread and render in another."""
    monkeypatch.setattr(pipeline_module, "is_compiled", lambda model: True)
    found = []

    def note(steps: Iterable[int]) -> Iterator[int]:
        found.append((torch._dynamo.config.recompile_limit, torch.compiler.config.cache_key_tag))
        yield from steps

    thread = threading.Thread(target=lambda: pipe("x", seed=1, progress_bar=note, **SMALL))
    thread.start()
    thread.join()
    [(limit, tag)] = found
    assert limit == 64
    assert tag.startswith("attention-torch")  # followed by the versions of CUDA and cuDNN, if torch has them


class TestRepeatability:
    def test_a_image_does_not_depend_on_its_neighbours(self, pipe: FluxImagePipeline) -> None:
        options = {
            "negative_prompt": ["", "no", "x"],
            "embedded_guidance": [1.0, 3.5, 8.0],
            "cfg_scale": [2.0, 1.0, 3.0],
        }
        together = pipe(PROMPTS, seed=SEEDS, **options, **SMALL)
        for i, prompt in enumerate(PROMPTS):
            alone = pipe(prompt, seed=SEEDS[i], **{name: values[i] for name, values in options.items()}, **SMALL)
            assert_within_one_level(together[i], alone)

    def test_the_same_call_is_bit_for_bit_the_same(self, pipe: FluxImagePipeline) -> None:
        first = pipe("x", seed=3, output_type="latent", **SMALL)
        assert torch.equal(pipe("x", seed=3, output_type="latent", **SMALL), first)
        assert not torch.equal(pipe("x", seed=4, output_type="latent", **SMALL), first)

    def test_mixed_cfg_scales_each_equal_their_own(self, pipe: FluxImagePipeline) -> None:
        common = {"negative_prompt": "bad", "seed": 8, "output_type": "latent", **SMALL}
        mixed = pipe(["x", "x"], cfg_scale=[1.0, 2.0], **common)
        for i, scale in enumerate([1.0, 2.0]):
            torch.testing.assert_close(mixed[i : i + 1], pipe("x", cfg_scale=scale, **common), atol=1e-5, rtol=0)
        assert (mixed[0] - mixed[1]).abs().max() > 1e-2

    def test_a_program_under_autocast_gets_the_same_and_spoils_nothing(self, pipe: FluxImagePipeline) -> None:
        common = {"output_type": "latent", **SMALL}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = pipe("under autocast", seed=3, **common)
        assert torch.equal(cast, pipe("under autocast", seed=3, **common))
        again = FluxImagePipeline(pipe.transformer, pipe.autoencoder, pipe.clip, pipe.t5, pipe.schedule)
        assert torch.equal(cast, again("under autocast", seed=3, **common))

    def test_no_seed_follows_the_global_generator(self, pipe: FluxImagePipeline) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(6)
            first = pipe(["x", "x"], output_type="latent", **SMALL)
            after = pipe(["x", "x"], output_type="latent", **SMALL)
            torch.manual_seed(6)
            assert torch.equal(pipe(["x", "x"], output_type="latent", **SMALL), first)
        assert not torch.equal(first, after)
        assert not torch.equal(first[0], first[1])

    def test_a_seeded_call_leaves_the_global_generator_alone(self, pipe: FluxImagePipeline) -> None:
        before = torch.get_rng_state()
        pipe("x", seed=3, output_type="latent", **SMALL)
        assert torch.equal(torch.get_rng_state(), before)

    def test_sigma_shift_replaces_the_schedule(self, pipe: FluxImagePipeline) -> None:
        common = {"seed": 1, "output_type": "latent", **SMALL}
        assert not torch.equal(pipe("x", sigma_shift=3.0, **common), pipe("x", **common))

    def test_bfloat16_is_finite_and_near(self, repository: Path, pipe: FluxImagePipeline) -> None:
        half = FluxImagePipeline.from_pretrained(repository, torch_dtype="bfloat16", device="cpu")
        ours = half(PROMPTS, seed=SEEDS, output_type="latent", **SMALL)
        exact = pipe(PROMPTS, seed=SEEDS, output_type="latent", **SMALL)
        assert ours.dtype == torch.bfloat16
        assert ours.isfinite().all()
        assert (ours.float() - exact).norm() / exact.norm() < 0.03

    @pytest.mark.parametrize("default", ["meta", torch.bfloat16])
    def test_torchs_defaults_do_not_matter(self, repository: Path, pipe: FluxImagePipeline, default: Any) -> None:
        """A program may have set torch's default device or dtype. On `meta`, tensors have no data."""
        image = noise_image(144, 160)
        size = {"height": 160, "width": 144, "num_inference_steps": 2, "t5_sequence_length": 16}
        call = {"prompt": ["a", "b"], "seed": [1, 2], "cfg_scale": [2.0, 1.0], "output_type": "np", **size}
        kinds: list[dict[str, Any]] = [
            {},
            {"sigma_shift": 3.0, "input_image": image, "denoising_strength": 0.7},
            {"mask_image": image, "input_image": image, "tiled": True, "tile_size": 16, "tile_stride": 13},
        ]
        expected = [pipe(**call, **kind) for kind in kinds]
        set_default = torch.set_default_device if default == "meta" else torch.set_default_dtype
        set_default(default)
        try:
            ours = FluxImagePipeline.from_pretrained(repository, **CPU)
            found = [ours(**call, **kind) for kind in kinds]
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(torch.float32)
        assert np.array_equal(found, expected)

    def test_tables_of_sizes_are_kept_and_change_nothing(self, repository: Path) -> None:
        pipe = FluxImagePipeline.from_pretrained(repository, **CPU)
        options = {"seed": 3, "output_type": "latent", "num_inference_steps": 1, "t5_sequence_length": 16}
        first = [pipe("x", height=height, width=width, **options) for height, width in ((32, 48), (48, 32), (32, 48))]
        assert pipe.position_tables.cache_info().currsize == 2
        fresh = FluxImagePipeline.from_pretrained(repository, **CPU)
        again = [fresh("x", height=height, width=width, **options) for height, width in ((48, 32), (32, 48))]
        assert torch.equal(first[0], first[2])
        assert torch.equal(first[1], again[0])
        assert torch.equal(first[0], again[1])

    def test_each_step_of_both_passes_is_a_recorded_one(self, pipe: FluxImagePipeline) -> None:
        options = {"seed": 3, "cfg_scale": 2.0, "negative_prompt": "bad", "output_type": "latent", **SMALL}
        recorder = GraphRecorder()
        assert torch.equal(with_graphs(pipe, recorder)("x", **options), pipe("x", **options))
        assert (recorder.num_records, recorder.num_replays) == (1, 2 * SMALL["num_inference_steps"])

    def test_text_encoders_that_are_to_be_offloaded_stay_on_the_cpu(
        self, repository: Path, pipe: FluxImagePipeline
    ) -> None:
        ours = FluxImagePipeline.from_pretrained(repository, offload_text_encoders=True, **CPU)
        options = {"seed": 3, "output_type": "latent", **SMALL}
        assert torch.equal(ours("x", **options), pipe("x", **options))


class TestOutput:
    def test_a_text_in_a_image_out_a_list_in_a_list_out(self, pipe: FluxImagePipeline) -> None:
        one = pipe("x", seed=1, **SMALL)
        assert isinstance(one, Image.Image)
        assert one.size == (96, 64)
        (same,) = pipe(["x"], seed=[1], **SMALL)
        assert one.tobytes() == same.tobytes()
        assert pipe([], **SMALL) == []

    def test_np_is_the_bytes_of_pil(self, pipe: FluxImagePipeline) -> None:
        array = pipe("x", seed=1, output_type="np", **SMALL)
        assert array.dtype == np.uint8
        assert array.shape == (64, 96, 3)
        assert array.tobytes() == pipe("x", seed=1, **SMALL).tobytes()

    def test_pt_and_latent_keep_the_batch_axis(self, pipe: FluxImagePipeline) -> None:
        pixels = pipe("x", seed=1, output_type="pt", **SMALL)
        assert pixels.shape == (1, 3, 64, 96)
        assert pixels.dtype == torch.float32
        assert -1 <= pixels.min() < pixels.max() <= 1
        assert pipe("x", seed=1, output_type="latent", **SMALL).shape == (1, 16, 8, 12)
        assert pipe(PROMPTS, output_type="latent", **SMALL).shape == (3, 16, 8, 12)

    def test_a_program_may_train_with_what_comes_out(self, pipe: FluxImagePipeline) -> None:
        made = [pipe("x", seed=1, output_type=kind, **SMALL) for kind in ("pt", "latent")]
        for values in (*made, *pipe.encode_prompt("x")):
            weight = torch.ones((), requires_grad=True)
            (weight * values).sum().backward()
            assert weight.grad is not None

    def test_progress_bar_wraps_the_steps(self, pipe: FluxImagePipeline) -> None:
        seen = []

        def bar(steps: Any) -> Iterator[int]:
            for step in steps:
                seen.append(step)
                yield step

        pipe("x", seed=1, progress_bar=bar, output_type="latent", **SMALL)
        assert seen == [0, 1, 2]

    def test_a_callback_of_diffusers_is_called_after_each_step(self, pipe: FluxImagePipeline) -> None:
        seen = []

        def note(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any] | None:
            seen.append((pipeline, step, timestep.item()))
            return {"latents": values["latents"] * 0} if step == 2 else None

        latents = pipe("x", seed=1, callback_on_step_end=note, output_type="latent", **SMALL)
        assert [step for _, step, _ in seen] == [0, 1, 2]
        assert seen[0][0] is pipe
        assert seen[0][2] == 1000.0 > seen[1][2] > seen[2][2] > 0
        assert not latents.any()

    def test_latents_of_a_callback_go_on_in_the_dtype_of_the_model(self, pipe: FluxImagePipeline) -> None:
        common = {"seed": 1, "output_type": "latent", **SMALL}
        expected = pipe("x", **common)
        changes: list[Callable[[torch.Tensor], Any]] = [torch.Tensor.double, torch.Tensor.numpy, lambda latents: None]
        for change in changes:

            def callback(*call: Any, change: Callable[[torch.Tensor], Any] = change) -> dict[str, Any]:
                return {"latents": change(call[-1]["latents"])}

            assert torch.equal(pipe("x", callback_on_step_end=callback, **common), expected)


class TestTexts:
    def test_truncations_say_which_encoder_misses_the_end(
        self, pipe: FluxImagePipeline, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        texts = ["", "a" * 75, "a" * 76, "a" * 600]
        assert pipe.truncations(texts, 512) == [(False, False), (False, False), (True, False), (True, True)]
        assert pipe.truncations(texts) == pipe.truncations(texts, 64)  # the model's own length
        assert pipe.truncations(texts, 50) == [(False, False), (False, True), (True, True), (True, True)]
        assert pipe.truncations([]) == []
        counted: list[list[str]] = []

        def count(tokenizer: Any, texts: list[str]) -> list[int]:
            counted.append(texts)
            return [1]

        for encoder in (clip, t5):
            monkeypatch.setattr(encoder, "count_tokens", count)
        assert pipe.truncations([*texts, "b"], 512)[:4] == [(False, False), (False, False), (True, False), (True, True)]
        assert counted == [["b"], ["b"]]

    def test_a_text_alone_is_counted_as_one(self, pipe: FluxImagePipeline) -> None:
        assert pipe.truncations("a" * 600) == [(True, True)]

    @pytest.mark.parametrize(
        ("prompts", "length", "field"),
        [(None, None, "prompts"), ([3], None, "prompts"), ("a", 0, "t5_sequence_length")],
    )
    def test_what_cannot_be_counted_is_refused(
        self, pipe: FluxImagePipeline, prompts: Any, length: int | None, field: str
    ) -> None:
        with pytest.raises(InvalidSetting) as caught:
            pipe.truncations(prompts, length)
        assert caught.value.field == field

    def test_embeddings_stand_in_for_texts(self, pipe: FluxImagePipeline) -> None:
        prompts, negative_prompts = ["a cat", "two dogs"], ["bad", ""]
        options = {"seed": [1, 2], "cfg_scale": 2.0, "output_type": "latent", "height": 32, "width": 48}
        options["num_inference_steps"] = 2
        expected = pipe(prompts, negative_prompt=negative_prompts, t5_sequence_length=16, **options)
        prompt_embeds, pooled_prompt_embeds = pipe.encode_prompt(prompts, 16)
        assert prompt_embeds.shape == (2, 16, T5_WIDTH)
        assert pooled_prompt_embeds.shape == (2, CLIP_WIDTH)
        negative_prompt_embeds, negative_pooled_prompt_embeds = pipe.encode_prompt(negative_prompts, 16)
        images = pipe(
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            **options,
        )
        assert torch.equal(images, expected)

    def test_one_prompt_is_encoded_to_the_default_length(self, pipe: FluxImagePipeline) -> None:
        assert pipe.encode_prompt("x").prompt_embeds.shape == (1, pipe.default_t5_sequence_length, T5_WIDTH)

    @pytest.mark.parametrize(("prompt", "length"), [([], None), (None, None), (["a", 3], None), ("a", 0)])
    def test_what_cannot_be_encoded_is_refused(self, pipe: FluxImagePipeline, prompt: Any, length: int | None) -> None:
        with pytest.raises(InvalidSetting, match="must be"):
            pipe.encode_prompt(prompt, length)

    @pytest.mark.parametrize(
        ("texts", "cfg_scale", "titles"),
        [
            (("b " * 30, ""), 1.0, ["T5"]),
            (("b " * 100, ""), 1.0, ["CLIP", "T5"]),
            (("x", "b " * 100), 1.0, []),
            (("x", "b " * 100), 2.0, ["CLIP", "T5"]),
        ],
    )
    def test_what_is_left_out_is_warned_of(
        self, pipe: FluxImagePipeline, texts: tuple[str, str], cfg_scale: float, titles: list[str]
    ) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pipe(texts[0], texts[1], cfg_scale=cfg_scale, t5_sequence_length=20, output_type="latent", **SMALL)
        assert [str(warning.message).split(" reads")[0].split()[-1] for warning in caught] == titles
        assert all(warning.filename == __file__ for warning in caught)

    @pytest.mark.parametrize(
        ("guidance_embed", "t5_max_length", "expected"),
        [(True, 512, 512), (False, 512, 256), (True, 96, 96), (False, 96, 96)],
    )
    def test_default_t5_length_is_that_of_the_model(
        self, tmp_path: Path, guidance_embed: bool, t5_max_length: int, expected: int
    ) -> None:
        config = TinyFlux(depth=1, depth_single_blocks=1, guidance_embed=guidance_embed, t5_max_length=t5_max_length)
        pipe = FluxImagePipeline.from_pretrained(make_tiny_repository(tmp_path / "model", config), **CPU)
        assert pipe.default_t5_sequence_length == expected
        common = {"seed": 1, "output_type": "latent", "height": 16, "width": 16, "num_inference_steps": 1}
        assert torch.equal(pipe("x", **common), pipe("x", t5_sequence_length=expected, **common))


class TestFromPretrained:
    def test_takes_a_file_address(self, repository: Path, pipe: FluxImagePipeline) -> None:
        again = FluxImagePipeline.from_pretrained(repository.as_uri(), **CPU)
        assert again.transformer.params == pipe.transformer.params

    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"no model folder .*not-there: `flux-batch download"):
            FluxImagePipeline.from_pretrained(tmp_path / "not-there", **CPU)

    def test_file_of_one_part_instead_of_folder(self, original_repository: Path) -> None:
        with pytest.raises(CheckpointError, match=r"ae\.safetensors holds no transformer and no .*: put it into a"):
            FluxImagePipeline.from_pretrained(original_repository / "ae.safetensors", **CPU)

    @pytest.mark.parametrize(
        ("sub_folder", "title"),
        [
            ("transformer", "transformer"),
            ("vae", "autoencoder"),
            ("text_encoder", "CLIP text encoder"),
            ("text_encoder_2", "T5 text encoder"),
        ],
    )
    def test_missing_part(self, repository: Path, tmp_path: Path, sub_folder: str, title: str) -> None:
        folder = copy_repository(repository, tmp_path / "model")
        for path in (folder / sub_folder).glob("*.safetensors"):
            path.unlink()
        with pytest.raises(CheckpointError, match=rf"no {title}: looked for .*{sub_folder}.*safetensors") as caught:
            FluxImagePipeline.from_pretrained(folder, **CPU)
        assert str(folder) in str(caught.value)

    def test_missing_tokenizer(self, repository: Path, tmp_path: Path) -> None:
        folder = copy_repository(repository, tmp_path / "model")
        (folder / "tokenizer_2" / "tokenizer.json").unlink()
        with pytest.raises(
            CheckpointError, match=r"tokenizer_2 is not a tokenizer: it lacks tokenizer\.json or spiece"
        ):
            FluxImagePipeline.from_pretrained(folder, **CPU)

    def test_damaged_tokenizer(self, repository: Path, tmp_path: Path) -> None:
        folder = copy_repository(repository, tmp_path / "model")
        (folder / "tokenizer" / "tokenizer.json").write_text("{")
        with pytest.raises(CheckpointError, match="holds a tokenizer that cannot be read"):
            FluxImagePipeline.from_pretrained(folder, **CPU)

    def test_two_files_for_one_part(self, original_repository: Path, tmp_path: Path) -> None:
        folder = copy_repository(original_repository, tmp_path / "model")
        (folder / "flux2.safetensors").write_bytes((folder / "flux1-tiny.safetensors").read_bytes())
        with pytest.raises(CheckpointError, match=r"several files for the transformer: flux1-tiny.*, flux2"):
            FluxImagePipeline.from_pretrained(folder, **CPU)

    def test_parts_of_two_models(self, repository: Path, tmp_path: Path) -> None:
        folder = copy_repository(repository, tmp_path / "model")
        for name in ("config.json", "model.safetensors"):
            (folder / "text_encoder_2" / name).unlink()
        wide = TinyFlux(depth=1, depth_single_blocks=1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiny_flux, "T5_WIDTH", 40)
            other = make_tiny_repository(tmp_path / "other", wide)
        for name in ("config.json", "model.safetensors"):
            (other / "text_encoder_2" / name).rename(folder / "text_encoder_2" / name)
        with pytest.raises(CheckpointError, match=r"not of one model: width of the T5 text encoder is 40, .* takes 24"):
            FluxImagePipeline.from_pretrained(folder, **CPU)

    @pytest.mark.parametrize("dtype", ["bfloat17", "int8", "Tensor", torch.int64])
    def test_unknown_dtype(self, repository: Path, dtype: Any) -> None:
        with pytest.raises(InvalidSetting, match="must be bfloat16, float16, float32 or auto"):
            FluxImagePipeline.from_pretrained(repository, torch_dtype=dtype, device="cpu")

    def test_a_device_that_is_none(self, repository: Path) -> None:
        for load in (partial(FluxImagePipeline.from_pretrained, repository), partial(ModelManager, None)):
            with pytest.raises(InvalidSetting, match="device = 'gpu': must be the name of a device") as caught:
                load(device="gpu")
            assert caught.value.field == "device"

    def test_a_cuda_device_beyond_the_last(self, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        with pytest.raises(InvalidSetting, match="device = cuda:2: the last CUDA device here is cuda:1"):
            FluxImagePipeline.from_pretrained(repository, device="cuda:2")

    def test_a_path_alone_is_a_list_of_one(self, original_repository: Path) -> None:
        file = original_repository / "ae.safetensors"
        assert ModelManager(torch.float32, "cpu", str(file)).autoencoder
        with pytest.raises(CheckpointError, match=r"ae\.safetensors is no ControlNet: it holds the autoencoder"):
            FluxImagePipeline.from_pretrained(original_repository, controlnets=str(file), **CPU)

    @pytest.mark.parametrize("paths", [None, 3, {"ae.safetensors"}])
    def test_what_is_no_list_of_paths(self, repository: Path, paths: Any) -> None:
        with pytest.raises(InvalidSetting, match=r"file_path_list = .*: must be a list of paths"):
            ModelManager(torch.float32, "cpu", paths)
        with pytest.raises(InvalidSetting, match=r"controlnets = .*: must be a list of paths"):
            FluxImagePipeline.from_pretrained(repository, controlnets=paths, **CPU)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
    def test_no_cuda(self, repository: Path) -> None:
        with pytest.raises(InvalidSetting, match="there is no CUDA device here; use cpu"):
            FluxImagePipeline.from_pretrained(repository, device="cuda")

    def test_cuda_graphs_on_no_cuda_device(self, repository: Path) -> None:
        message = "^cuda_graphs = True: CUDA graphs need a CUDA device, and the transformer is on cpu$"
        with pytest.raises(InvalidSetting, match=message) as caught:
            FluxImagePipeline.from_pretrained(repository, cuda_graphs=True, **CPU)
        assert caught.value.field == "cuda_graphs"

    def test_cuda_graphs_beside_a_step_cache(self, repository: Path, pipe: FluxImagePipeline) -> None:
        for refused in (
            lambda: FluxImagePipeline.from_pretrained(repository, cuda_graphs=True, step_cache=0.1, **CPU),
            lambda: with_graphs(pipe, GraphRecorder())("x", step_cache=0.1, **SMALL),
        ):
            with pytest.raises(InvalidSetting, match=r"leave it out, or set step_cache = 0\.1 to 0$"):
                refused()


@pytest.mark.parametrize("place", ["record", "decode"])
def test_records_of_steps_leave_their_memory_to_the_next_try(
    monkeypatch: pytest.MonkeyPatch, pipe: FluxImagePipeline, place: str
) -> None:
    def fail(*given: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    recorder = GraphRecorder()
    pipe = with_graphs(pipe, recorder)
    expected = pipe("x", seed=1, output_type="np", **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(*((pipe.graphs, "_record") if place == "record" else (pipe.autoencoder, "decode")), fail)
        with pytest.raises(OutOfMemory):
            pipe(["x", "y"], seed=[1, 2], output_type="np", **SMALL)
    before = recorder.num_records
    assert np.array_equal(pipe("x", seed=1, output_type="np", **SMALL), expected)
    assert recorder.num_records == before + 1


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("float32", "overflowed in float32: lower its guidance or the scales of LoRAs"),
        # The autoencoder still computes in float32.
        ("float16", "overflowed in float16: use bfloat16 or float32"),
    ],
)
def test_a_image_that_overflowed_is_an_error_and_not_black(repository: Path, dtype: str, message: str) -> None:
    broken = FluxImagePipeline.from_pretrained(repository, torch_dtype=dtype, device="cpu")
    broken.autoencoder.decoder.conv_out.bias.data[0] = float("nan")
    with pytest.raises(RowError, match=message):
        broken("x", seed=0, **SMALL)


def test_a_pipeline_says_what_it_is(pipe: FluxImagePipeline) -> None:
    assert repr(pipe).startswith("FluxImagePipeline(float32, quantization none, cpu")


def test_numbers_of_numpy_are_numbers(pipe: FluxImagePipeline) -> None:
    size = {name: np.int64(value) for name, value in SMALL.items()}
    arrays = [pipe("x", seed=seed, output_type="np", **kind) for seed, kind in ((7, SMALL), (np.int64(7), size))]
    assert np.array_equal(*arrays)
