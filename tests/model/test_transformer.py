"""The transformer and the loop around it against golden numbers that BFL's and diffusers' code agree on."""

import pytest
import torch
from golden import FLUX, check, filled, tensor, u

from flux_batch.model.layers import RMSNorm, timestep_embedding
from flux_batch.model.params import DEV, SCHNELL, SCHNELL_SCHEDULE, DEV_SCHEDULE
from flux_batch.model.sampling import Conditioning, denoise, make_sigmas, pack, position_ids, unpack
from flux_batch.model.transformer import Flux


@pytest.fixture(scope="module")
def model() -> Flux:
    return filled(Flux(FLUX))


IMG = tensor("in.img", (1, 24, 64))
TXT = tensor("in.txt", (1, 7, 24))
VEC = tensor("in.vec", (1, 32))
T = torch.tensor([0.7371])
G = torch.tensor([3.5])
IDS = position_ids(7, 8, 12)


def test_deterministic_numbers() -> None:
    torch.testing.assert_close(
        torch.from_numpy(u("a", (4,))),
        torch.tensor([0.5463010925, -0.7731105355, -0.9655217808, -0.8762588999], dtype=torch.float64),
        atol=1e-9,
        rtol=0,
    )


def test_timestep_embedding() -> None:
    first = [-0.386191, 0.491118, -0.847819, -0.974737, 0.985021]
    check(timestep_embedding(T), 50.832442, 163.698144, first, [0.091342, 0.075084 + 0.010001, 0.079127])
    half = timestep_embedding(torch.tensor([0.5]))[0]
    expected = {0: -0.8838, 1: 0.9459, 2: 0.8485, 127: 0.9986, 128: -0.4678, 129: 0.3243, 255: 0.0537}
    assert {i: round(half[i].item(), 4) for i in expected} == expected


def test_model(model) -> None:
    check(
        model(IMG, TXT, model.position_table(IDS), T, VEC, G),
        64.976769,
        1358.445124,
        [2.104066, -0.892753, 0.200263, -0.531578, 0.586761],
        [-1.478314, -0.417823, -2.355408],
    )
