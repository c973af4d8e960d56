"""The transformer compared with golden numbers on which BFL's and diffusers' code agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flux_batch.model.layers import RMSNorm, SingleStreamBlock, timestep_embedding
from flux_batch.model.rope import rotary_table, rotate
from flux_batch.model.sampling import position_ids
from flux_batch.model.transformer import Flux
from helpers.golden import FLUX, check, filled, tensor, u

IMG = tensor("in.img", (1, 24, 64))
TXT = tensor("in.txt", (1, 7, 24))
VEC = tensor("in.vec", (1, 32))
T = torch.tensor([0.7371])
G = torch.tensor([3.5])
IDS = position_ids(7, 8, 12)


@pytest.fixture(scope="module")
def model() -> Flux:
    return filled(Flux(FLUX))


def test_golden_weights_are_those_of_the_recipe() -> None:
    expected = torch.tensor([0.5463010925, -0.7731105355, -0.9655217808, -0.8762588999], dtype=torch.float64)
    torch.testing.assert_close(torch.from_numpy(u("a", (4,))), expected, atol=1e-9, rtol=0)


def test_timestep_embedding_is_golden() -> None:
    first = [-0.386191, 0.491118, -0.847819, -0.974737, 0.985021]
    check(timestep_embedding(T), 50.832442, 163.698144, first, [0.091342, 0.085016, 0.079127])


def test_timestep_embedding_has_cosines_first() -> None:
    half = timestep_embedding(torch.tensor([0.5]))[0]
    expected = {0: -0.8838, 1: 0.9459, 2: 0.8485, 127: 0.9986, 128: -0.4678, 129: 0.3243, 255: 0.0537}
    assert {i: round(half[i].item(), 4) for i in expected} == expected


def test_guidance_is_rounded_to_bfloat16_after_the_product_with_1000() -> None:
    in_bf16 = timestep_embedding(torch.tensor([3.5], dtype=torch.bfloat16))
    torch.testing.assert_close(in_bf16, timestep_embedding(torch.tensor([3.504])).bfloat16(), rtol=0, atol=0)


def test_conditioning_is_golden(model: Flux) -> None:
    time = model.time_in(timestep_embedding(T))
    guidance = model.guidance_in(timestep_embedding(G))
    check(
        time, 1.990849, 22.751248, [0.330201, -0.024724, 0.076121, 0.360862, 0.127956], [-0.067610, -0.360614, 0.462046]
    )
    first = [0.336730, -0.762290, 0.173004, -0.377354, 0.110984]
    check(guidance, -2.484904, 22.329777, first, [0.278268, 0.295221, 0.716995])
    first = [1.065686, -1.350427, 0.529999, 0.015627, 0.486434]
    check(model.conditioning(T, VEC, G), -2.754538, 40.482392, first, [0.276175, -0.470680, 1.327485])


def test_rotary_table_is_golden(model: Flux) -> None:
    cos, sin = model.position_table(IDS).unbind(-1)
    check(torch.stack((cos, -sin, sin, cos)), 399.068788, 526.624608)
    # The text has position 0 on every axis, so it is not rotated; neither is the first axis.
    assert (cos[:7] == 1).all()
    assert (sin[:7] == 0).all()
    assert (sin[:, :2] == 0).all()


def test_rotary_angles_are_exact_at_far_positions() -> None:
    ids = torch.tensor([[0.0, 511.0, 257.0]])
    cos, sin = rotary_table(ids, (4, 6, 6), 10_000).unbind(-1)
    exact = torch.tensor(
        [0, 0, *(p * 10_000 ** (-2 * k / 6) for p in (511, 257) for k in range(3))], dtype=torch.float64
    )
    torch.testing.assert_close(cos[0].double(), exact.cos(), rtol=0, atol=1e-7)
    torch.testing.assert_close(sin[0].double(), exact.sin(), rtol=0, atol=1e-7)


def test_rotation_turns_neighbouring_pairs() -> None:
    quarter = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])  # 90 degrees, then none
    x = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]])
    torch.testing.assert_close(rotate(x, quarter), torch.tensor([[[[-2.0, 1.0, 3.0, 4.0]]]]))


def test_blocks_are_golden(model: Flux) -> None:
    pe, modulations = model.position_table(IDS), model.modulations(model.conditioning(T, VEC, G))
    img, txt = model.first_block(model.img_in(IMG), model.txt_in(TXT), modulations, pe)
    first = [-1.426983, -0.457240, -0.545143, -0.312157, -0.490049]
    check(img, -64.377955, 841.732447, first, [-0.624870, 0.225210, -0.341814])
    first = [-0.760239, -1.122771, -0.353813, 0.015056, 0.723065]
    check(txt, -9.995291, 258.050237, first, [-0.083634, 0.241845, 0.188439])
    img, txt = model.double_blocks[1](img, txt, modulations.double[1], pe)
    first = [-1.697651, -0.399068, -0.611087, 0.383398, -0.085566]
    check(img, -19.014891, 937.610792, first, [-0.496485, 0.327781, -0.411176])
    x = model.single_blocks[0](torch.cat((txt, img), dim=1), modulations.single[0], pe, num_read=31)
    first = [-0.571188, -1.199425, -0.243147, 0.122418, 0.466457]
    check(x, 14.960265, 1299.969737, first, [-0.506435, 0.285453, -0.533760])
    x = model.single_blocks[1](x, modulations.single[1], pe, num_read=31)
    x = model.single_blocks[2](x, modulations.single[2], pe, num_read=31)
    first = [-0.543140, -1.139133, -0.496298, 0.015803, 0.301811]
    check(x, -48.710583, 1525.489480, first, [-0.632302, 0.369279, -0.500592])


def test_the_last_block_leaves_out_text_that_nobody_reads(model: Flux) -> None:
    pe, modulations = model.position_table(IDS), model.modulations(model.conditioning(T, VEC, G))
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [
        block.register_forward_hook(lambda _, given, x: seen.append((given[0], x))) for block in model.single_blocks
    ]
    img, txt = model.first_block(model.img_in(IMG), model.txt_in(TXT), modulations, pe)
    some = model.later_blocks(img, txt, modulations, pe)
    for hook in hooks:
        hook.remove()
    both = txt.shape[1] + img.shape[1]
    assert [x.shape[1] for _, x in seen] == [both, both, img.shape[1]]
    whole = model.single_blocks[-1](seen[-1][0], modulations.single[-1], pe, num_read=both)
    torch.testing.assert_close(whole[:, txt.shape[1] :], some, rtol=0, atol=2e-6)


def test_model_output_is_golden(model: Flux) -> None:
    first = [2.104066, -0.892753, 0.200263, -0.531578, 0.586761]
    out = model(IMG, TXT, model.position_table(IDS), T, VEC, G)
    check(out, 64.976769, 1358.445124, first, [-1.478314, -0.417823, -2.355408])


def test_model_with_a_guidance_embedder_asks_for_guidance(model: Flux) -> None:
    with pytest.raises(ValueError, match="embeds guidance"):
        model(IMG, TXT, model.position_table(IDS), T, VEC, None)


def test_each_image_of_a_batch_has_its_own_timestep_and_guidance(model: Flux) -> None:
    pe = model.position_table(IDS)
    two = [torch.cat((part, 0.5 * part)) for part in (IMG, TXT, VEC)]
    t, g = torch.tensor([0.7371, 0.2]), torch.tensor([3.5, 1.0])
    together = model(two[0], two[1], pe, t, two[2], g)
    for i in range(2):
        row = slice(i, i + 1)
        alone = model(two[0][row], two[1][row], pe, t[row], two[2][row], g[row])
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=0)


def test_norm_of_zeros_is_zero() -> None:
    norm = RMSNorm(4)
    torch.testing.assert_close(norm(torch.zeros(2, 4)), torch.zeros(2, 4))
    torch.testing.assert_close(norm(torch.full((1, 4), 3.0)), torch.ones(1, 4))


def test_a_float16_stream_that_overflows_is_clipped() -> None:
    block = SingleStreamBlock(8, 1, 8).half()
    torch.nn.init.constant_(block.linear2.bias, 60_000.0)
    torch.nn.init.constant_(block.modulation.lin.bias, 4.0)
    pe = rotary_table(torch.zeros(3, 1), (8,), 10_000)
    out = block(torch.ones(1, 3, 8).half(), block.modulation(torch.zeros(1, 8).half()), pe, num_read=3)
    assert out.isfinite().all()
    assert out.max() == 65504
