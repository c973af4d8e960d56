"""Noise, packing, positions, schedules and the Euler loop, compared with reference numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flux_batch.model.params import DEV_SCHEDULE, SCHNELL_SCHEDULE, ScheduleParams, first_step
from flux_batch.model.sampling import (
    add_noise,
    denoise,
    guide,
    make_generators,
    make_noise,
    make_sigmas,
    pack,
    position_ids,
    shift_exponent,
    timesteps_of,
    unpack,
)
from flux_batch.model.transformer import Denoiser, Flux, PromptEmbeds
from helpers.golden import FLUX, check, filled, tensor

POSITIVE = PromptEmbeds(tensor("in.txt", (1, 7, 24)), tensor("in.vec", (1, 32)))
NEGATIVE = PromptEmbeds(tensor("in.negtxt", (1, 7, 24)), tensor("in.negvec", (1, 32)))
NOISE = 3**0.5 * tensor("in.noise", (1, 16, 8, 12)).double()
# fmt: off
DEV_28 = [
    1, .988409, .976222, .963394, .949873, .935599, .920509, .904531, .887583, .869576, .850406, .829956, .808096,
    .784672, .759511, .732413, .703145, .671435, .636964, .599357, .558163, .512844, .462748, .407078, .344849,
    .274828, .195455, .104721, 0,
]
# fmt: on


@pytest.fixture(scope="module")
def model() -> Flux:
    return filled(Flux(FLUX))


SIGMAS = make_sigmas(4, 24, DEV_SCHEDULE)


def denoiser(model: Flux, text: PromptEmbeds) -> Denoiser:
    pe, guidance = model.position_table(position_ids(7, 8, 12)), torch.tensor([3.5])
    return Denoiser(model, text, pe, timesteps_of(SIGMAS, guidance), guidance)


def loop(model: Flux, **options: Any) -> torch.Tensor:
    return denoise(denoiser(model, POSITIVE), pack(NOISE.float()), SIGMAS, **options)


def test_denoise_is_golden(model: Flux) -> None:
    packed = loop(model)
    first = [-3.122741, 0.345113, 1.708488, 0.798638, 0.282265]
    check(packed, 0.460350, 1741.774016, first, [-0.542914, -1.008624, 2.434146])
    first = [-3.122741, 0.345113, -0.794911, 0.174330, -2.148660]
    check(unpack(packed, 8, 12), 0.460350, 1741.774016, first, [0.699049, -1.008624, 2.434146])


def test_true_cfg_is_golden(model: Flux) -> None:
    packed = loop(model, negative=denoiser(model, NEGATIVE), cfg_scale=torch.tensor([2.0]))
    first = [-2.997897, -0.613584, 1.341949, 0.733143, 1.028966]
    check(packed, 20.155766, 1902.105014, first, [-1.480010, -0.855846, 2.439747])


def test_cfg_scale_of_one_is_bit_for_bit_no_cfg(model: Flux) -> None:
    assert torch.equal(loop(model, negative=denoiser(model, NEGATIVE), cfg_scale=torch.tensor([1.0])), loop(model))


def test_progress_sees_every_step(model: Flux) -> None:
    seen = []

    def progress(steps):
        for step in steps:
            seen.append(step)
            yield step

    loop(model, progress=progress)
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("sigmas", "expected"),
    [
        (make_sigmas(4, 4096, DEV_SCHEDULE), [1, 0.90453076, 0.75951093, 0.51284415, 0]),
        (make_sigmas(4, 4096, SCHNELL_SCHEDULE), [1, 0.75, 0.5, 0.25, 0]),
        (make_sigmas(4, 4096, DEV_SCHEDULE, sigma_shift=3.0), [1, 0.85769236, 0.60215056, 0.00892857, 0]),
        (make_sigmas(4, 4096, SCHNELL_SCHEDULE, sigma_shift=3.0), [1, 0.85769236, 0.60215056, 0.00892857, 0]),
        (make_sigmas(4, 24, DEV_SCHEDULE), [1, 0.8262588382, 0.6131871939, 0.3457252383, 0]),
        (make_sigmas(1, 4096, DEV_SCHEDULE), [1.0, 0.0]),
        (make_sigmas(1, 4096, SCHNELL_SCHEDULE, sigma_shift=3.0), [1.0, 0.0]),
    ],
    ids=[
        "dev",
        "schnell",
        "static shift on dev",
        "static shift on schnell",
        "dev 64x96",
        "one step",
        "one static step",
    ],
)
def test_schedule_is_golden(sigmas: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(sigmas, torch.tensor(expected), atol=1.2e-7, rtol=0)
    assert sigmas.dtype == torch.float32


def test_schedule_of_28_steps_is_golden() -> None:
    torch.testing.assert_close(make_sigmas(28, 4096, DEV_SCHEDULE), torch.tensor(DEV_28), atol=5e-7, rtol=0)


@pytest.mark.parametrize(
    ("num_tokens", "mu"), [(256, 0.5), (1024, 0.63), (4080, 1.1472917), (4096, 1.15), (9216, 2.0166667), (16384, 3.23)]
)
def test_shift_exponent_is_linear_in_tokens_and_extrapolates(num_tokens: int, mu: float) -> None:
    assert shift_exponent(num_tokens, DEV_SCHEDULE) == pytest.approx(mu, abs=1e-7)


@given(
    st.integers(1, 100),
    st.integers(1, 20_000),
    st.sampled_from([DEV_SCHEDULE, SCHNELL_SCHEDULE, ScheduleParams(use_dynamic_shifting=False, shift=3.0)]),
    st.none() | st.floats(0.1, 20),
)
def test_every_schedule_falls_from_one_to_zero(
    n: int, tokens: int, schedule: ScheduleParams, shift: float | None
) -> None:
    sigmas = make_sigmas(n, tokens, schedule, shift)
    assert len(sigmas) == n + 1
    assert sigmas[0] == pytest.approx(1.0, abs=1e-6)
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_noise_is_golden() -> None:
    noise = make_noise((16, 128, 128), make_generators([0, 42]))
    check(noise[:1], -888.9205, noise[0].double().abs().sum().item(), [-1.125840, -1.152360, -0.250579, -0.433879])
    expected = torch.tensor([1.926915, 1.487284, 0.900717, -2.105521, 0.678418, -1.234545])
    torch.testing.assert_close(noise[1].flatten()[:6], expected, atol=1e-5, rtol=0)


def test_noise_rounded_to_bfloat16_is_what_the_references_draw_in_bfloat16() -> None:
    theirs = torch.randn((1, 16, 32, 24), generator=torch.Generator().manual_seed(7), dtype=torch.bfloat16)
    assert torch.equal(make_noise((16, 32, 24), make_generators([7])).bfloat16(), theirs)


def test_noise_of_an_image_does_not_depend_on_its_neighbours() -> None:
    together = make_noise((16, 4, 6), make_generators([1, 2, 3]))
    for i, seed in enumerate([1, 2, 3]):
        assert torch.equal(together[i : i + 1], make_noise((16, 4, 6), make_generators([seed])))


def test_noise_without_a_seed_follows_the_global_generator() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(6)
        first = make_noise((16, 4, 6), make_generators([None, None]))
        torch.manual_seed(6)
        assert torch.equal(make_noise((16, 4, 6), make_generators([None, None])), first)
    assert not torch.equal(first[0], first[1])


def test_a_token_is_channel_then_row_then_column() -> None:
    latents = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6)
    tokens = pack(latents)
    assert tokens.shape == (1, 6, 8)
    # Second row of patches, third column: channel 0 rows 2 and 3, then channel 1.
    assert tokens[0, 5].tolist() == [16, 17, 22, 23, 40, 41, 46, 47]


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 7), st.integers(1, 7))
def test_unpack_undoes_pack(b: int, c: int, rows: int, cols: int) -> None:
    latents = torch.arange(b * c * rows * cols * 4).reshape(b, c, 2 * rows, 2 * cols)
    tokens = pack(latents)
    assert tokens.shape == (b, rows * cols, 4 * c)
    assert torch.equal(unpack(tokens, 2 * rows, 2 * cols), latents)


def test_position_ids_are_zero_for_text_then_row_and_column() -> None:
    ids = position_ids(2, 4, 6)
    assert ids.tolist() == [[0, 0, 0]] * 2 + [[0, row, col] for row in range(2) for col in range(3)]
    assert ids.dtype == torch.float32


@given(st.integers(1, 60), st.floats(0.01, 1.0))
def test_strength_leaves_out_the_first_steps(n: int, strength: float) -> None:
    whole = make_sigmas(n, 4096, DEV_SCHEDULE)
    assert torch.equal(make_sigmas(n, 4096, DEV_SCHEDULE, strength=strength), whole[first_step(n, strength) :])


@pytest.mark.parametrize(
    ("strength", "expected"),
    [
        (1.0, [1, 0.85769236, 0.60215056, 0.00892857, 0]),
        # 3 s / (1 + 2 s) of 0.6011976, 0.4017964, 0.2023952 and 0.0029940
        (0.6, [0.81892333, 0.66832669, 0.43222506, 0.00892857, 0]),
    ],
)
def test_strength_lowers_the_start_of_the_static_schedule(strength: float, expected: list[float]) -> None:
    sigmas = make_sigmas(4, 4096, DEV_SCHEDULE, sigma_shift=3.0, strength=strength)
    torch.testing.assert_close(sigmas, torch.tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0])
def test_true_cfg_goes_from_the_negative_through_the_positive(scale: float) -> None:
    positive, negative = tensor("in.positive", (1, 3, 4)), tensor("in.negative", (1, 3, 4))
    guided = guide(positive, negative, torch.tensor([scale]))
    torch.testing.assert_close(guided, (1 - scale) * negative + scale * positive, atol=1e-6, rtol=0)


def test_an_image_without_cfg_has_the_bits_it_has_alone_beside_one_with_it_in_bfloat16() -> None:
    img, negative = (tensor(f"in.{name}", (2, 6, 64)).bfloat16() for name in ("img", "negative"))
    sigmas = torch.tensor([1.0, 0.7003, 0.0])

    def velocity(_: int, img: torch.Tensor) -> torch.Tensor:
        return 3 * img.sin()

    alone = denoise(velocity, img[:1], sigmas)
    cfg = {"negative": lambda *_: negative, "cfg_scale": torch.tensor([1.0, 2.3])}
    assert torch.equal(denoise(velocity, img, sigmas, **cfg)[:1], alone)


def test_noise_is_added_with_sigma_rounded_to_the_dtype_of_the_latents() -> None:
    latents, noise = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([3.0], dtype=torch.bfloat16)
    sigma = torch.tensor(0.7001)
    rounded = sigma.bfloat16()
    assert torch.equal(add_noise(latents, noise, sigma), rounded * noise + (1.0 - rounded) * latents)
    assert torch.equal(add_noise(latents, noise, torch.tensor(1.0)), noise)
