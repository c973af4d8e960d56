"""Recorded steps give the model's velocities for every size, text and step, independent of earlier calls.

Recording itself needs a device, see tests/gpu.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flux_batch.model.optimize.cuda_graphs import CudaGraphs
from flux_batch.model.sampling import denoise
from flux_batch.model.transformer import Denoiser, Flux
from helpers import three_images
from helpers.golden import FLUX, filled
from helpers.graph_recorder import GraphRecorder
from helpers.three_images import GUIDANCE, NEGATIVE, NOISE

STEPS = 5
SIGMAS = torch.linspace(1.0, 0.0, STEPS + 1)
SIZES = [(8, 12), (12, 8), (8, 8), (4, 4)]


@pytest.fixture(scope="module")
def model() -> Flux:
    return filled(Flux(FLUX))


@pytest.fixture
def recorder() -> GraphRecorder:
    return GraphRecorder()


def denoiser(model: Flux, size: tuple[int, int] = (8, 12), images: int = 3, **text: Any) -> Denoiser:
    return three_images.denoiser(model, SIGMAS, slice(images), size=size, **text)


def noise(size: tuple[int, int] = (8, 12), images: int = 3) -> Tensor:
    return NOISE[:images, : size[0] * size[1] // 4]


@torch.inference_mode()
def test_a_loop_gives_the_same_bits_with_true_guidance(model: Flux, recorder: GraphRecorder) -> None:
    graphs = CudaGraphs(model, recorder)
    positive, negative = denoiser(model), denoiser(model, text=NEGATIVE)
    expected = denoise(positive, noise(), SIGMAS, negative=negative, cfg_scale=GUIDANCE)
    found = denoise(graphs(positive), noise(), SIGMAS, negative=graphs(negative), cfg_scale=GUIDANCE)
    assert torch.equal(found, expected)
    assert (recorder.num_records, recorder.num_replays) == (1, 2 * STEPS)


@torch.inference_mode()
def test_each_number_of_tokens_and_images_has_a_record_of_its_own(model: Flux, recorder: GraphRecorder) -> None:
    graphs = CudaGraphs(model, recorder)
    for _ in range(2):
        for size in SIZES:
            for images in (1, 3):
                velocity = denoiser(model, size, images)
                expected = denoise(velocity, noise(size, images), SIGMAS)
                assert torch.equal(denoise(graphs(velocity), noise(size, images), SIGMAS), expected)
    # 8 x 12 and 12 x 8 have the same number of tokens, at different positions.
    assert recorder.num_records == 6


@torch.inference_mode()
def test_the_sizes_used_last_are_remembered(model: Flux, recorder: GraphRecorder) -> None:
    graphs = CudaGraphs(model, recorder, max_graphs=2)
    records = []
    for images in (1, 2, 1, 3, 1, 2):
        graphs(denoiser(model, images=images))(0, noise(images=images))
        records.append(recorder.num_records)
    assert records == [1, 2, 2, 3, 3, 4]


@torch.inference_mode()
def test_a_velocity_outlives_the_next_step(model: Flux, recorder: GraphRecorder) -> None:
    velocity = CudaGraphs(model, recorder)(denoiser(model))
    first = velocity(0, noise())
    kept = first.clone()
    assert not torch.equal(velocity(1, 2 * noise()), kept)
    assert torch.equal(first, kept)


@torch.inference_mode()
def test_what_a_step_is_given_is_left_as_it_is(model: Flux, recorder: GraphRecorder) -> None:
    graphs, size = CudaGraphs(model, recorder), (8, 12)
    text = denoiser(model)
    kept = [each.clone() for each in (noise(), text.txt, text.pe)]
    graphs(text)(0, noise())
    graphs(denoiser(model, (12, 8), text=NEGATIVE))(1, 2 * noise(size))
    assert all(torch.equal(*pair) for pair in zip((noise(), text.txt, text.pe), kept, strict=True))


def test_weights_changed_in_their_place_are_heard_and_moved_ones_recorded_again(recorder: GraphRecorder) -> None:
    model = filled(Flux(FLUX))
    graphs = CudaGraphs(model, recorder)

    def both() -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            return graphs(denoiser(model))(2, noise()), denoiser(model)(2, noise())

    first = both()
    weight = model.single_blocks[0].linear2.weight
    with torch.no_grad():
        weight.mul_(0.5)
    changed = both()
    assert recorder.num_records == 1
    assert torch.equal(*changed)
    assert not torch.equal(changed[0], first[0])
    weight.data = 2 * weight.data  # as a program that loads other weights
    assert torch.equal(*both())
    assert recorder.num_records == 2


def test_a_model_on_no_cuda_device_is_refused(model: Flux) -> None:
    with pytest.raises(ValueError, match=r"^CUDA graphs need a CUDA device, and the transformer is on cpu$"):
        CudaGraphs(model)
