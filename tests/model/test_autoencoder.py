"""The autoencoder compared with golden numbers on which BFL's and diffusers' code agree."""

from __future__ import annotations

import pytest
import torch

from flux_batch.model.autoencoder import AutoEncoder
from flux_batch.model.params import DEV_SCHEDULE
from flux_batch.model.sampling import denoise, make_sigmas, pack, position_ids, timesteps_of, unpack
from flux_batch.model.transformer import Denoiser, Flux, PromptEmbeds
from flux_batch.pipeline.images.pixels import to_uint8
from helpers.golden import AUTOENCODER, FLUX, check, filled, tensor

IMAGE = tensor("in.image", (1, 3, 64, 96))


@pytest.fixture(scope="module")
def autoencoder() -> AutoEncoder:
    return filled(AutoEncoder(AUTOENCODER))


@pytest.fixture(scope="module")
def decoded(autoencoder: AutoEncoder) -> torch.Tensor:
    """The final image of the golden denoising."""
    model = filled(Flux(FLUX))
    text = PromptEmbeds(tensor("in.txt", (1, 7, 24)), tensor("in.vec", (1, 32)))
    sigmas, guidance = make_sigmas(4, 24, DEV_SCHEDULE), torch.tensor([3.5])
    pe = model.position_table(position_ids(7, 8, 12))
    velocity = Denoiser(model, text, pe, timesteps_of(sigmas, guidance), guidance)
    tokens = denoise(velocity, pack(tensor("in.noise", (1, 16, 8, 12), 3**0.5)), sigmas)
    return autoencoder.decode(unpack(tokens, 8, 12))


def test_encoder_moments_are_golden(autoencoder: AutoEncoder) -> None:
    first = [0.059503, -0.166193, 0.033467, -0.378563, -0.519165]
    check(autoencoder.encoder(IMAGE), -47.685482, 1370.856107, first, [0.577973, 0.179421, -0.221763])


def test_encoding_to_the_mean_is_golden(autoencoder: AutoEncoder) -> None:
    first = [-0.020365, -0.101864, -0.029767, -0.178551, -0.229322]
    check(autoencoder.encode(IMAGE), -64.251578, 260.290613, first, [0.067988, 0.113599, -0.112954])


def test_encoding_with_noise_samples_the_posterior(autoencoder: AutoEncoder) -> None:
    mean, logvar = autoencoder.encoder(IMAGE).chunk(2, dim=1)
    noise = tensor("in.posterior", mean.shape)
    expected = 0.3611 * (mean + (0.5 * logvar).exp() * noise - 0.1159)
    torch.testing.assert_close(autoencoder.encode(IMAGE, noise), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(autoencoder.encode(IMAGE, 0 * noise), autoencoder.encode(IMAGE), atol=0, rtol=0)


def test_decoding_is_golden(decoded: torch.Tensor) -> None:
    assert decoded.shape == (1, 3, 64, 96)
    first = [0.346306, 0.444835, 0.410656, 0.390466, 0.200850]
    check(decoded, 477.581358, 7794.163766, first, [0.004506, -0.028699, -0.143015])


def test_rounding_to_uint8_is_golden(decoded: torch.Tensor) -> None:
    image = to_uint8(decoded)[0].permute(2, 0, 1).numpy().astype(int)
    # A value within 1e-6 of a half may round either way on another CPU.
    assert abs(int(image.sum()) - 2396151) <= 3
    assert image.ravel()[:6].tolist() == [172, 184, 180, 177, 153, 157]


def test_uint8_is_clamped_and_rounded_half_to_even() -> None:
    levels = [0.5, 1.5, 2.49, 254.51]
    pixels = torch.tensor([-3.0, -1.0, 0.0, 1.0, 1.1, *(level / 127.5 - 1 for level in levels)], dtype=torch.float64)
    values = to_uint8(pixels[None, None, None, :].expand(1, 3, 1, -1))[0, 0, :, 0].tolist()
    assert values[:5] == [0, 0, 128, 255, 255]
    assert values[7:] == [2, 255]


def test_every_image_of_a_batch_is_decoded_alike(autoencoder: AutoEncoder) -> None:
    latents = tensor("in.noise", (2, 16, 4, 6))
    together = autoencoder.decode(latents)
    for i in range(2):
        torch.testing.assert_close(together[i : i + 1], autoencoder.decode(latents[i : i + 1]), atol=1e-5, rtol=0)
