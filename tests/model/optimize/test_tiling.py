"""Tiles cover every pixel at every size, have no visible seams, and need the memory of one tile."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flux_batch.model.autoencoder import AutoEncoder
from flux_batch.model.optimize.tiling import Tiling, blend_tiles, fade, starts, tiled_decode, tiled_moments
from helpers.golden import AUTOENCODER, filled, tensor

pytestmark = pytest.mark.slow

sides = st.integers(1, 70)
tilings = st.integers(1, 40).flatmap(
    lambda size: st.builds(Tiling, st.just(size), st.integers(max(1, size // 4), size))
)


def larger(x: Tensor) -> Tensor:
    """A fake decoder: the same image, eight times as large."""
    return F.interpolate(x, scale_factor=8.0, mode="nearest")


def smaller(x: Tensor) -> Tensor:
    """A fake encoder: the mean of each 8 x 8 pixels."""
    return F.avg_pool2d(x, 8)


@pytest.fixture(scope="module")
def autoencoder() -> AutoEncoder:
    return filled(AutoEncoder(AUTOENCODER))


@given(st.integers(1, 300), tilings)
def test_tiles_cover_everything_and_stay_inside(length: int, tiling: Tiling) -> None:
    size = min(tiling.size, length)
    found = starts(length, size, tiling.stride)
    assert found[0] == 0
    assert found[-1] + size == length
    assert all(0 < after - before <= tiling.stride for before, after in pairwise(found))


@settings(max_examples=10)
@given(sides, sides, tilings)
def test_no_pixel_is_uncovered_at_any_size(height: int, width: int, tiling: Tiling) -> None:
    x = torch.arange(height * width, dtype=torch.float32).reshape(1, 1, height, width) / (height * width) - 0.5
    torch.testing.assert_close(blend_tiles(larger, x, tiling), larger(x), atol=1e-5, rtol=0)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4))
def test_tiles_shrink_too(height: int, width: int, size: int, stride: int) -> None:
    x = tensor("in.tiles", (2, 3, 8 * height, 8 * width))
    tiling = Tiling(8 * max(size, stride), 8 * stride)
    torch.testing.assert_close(blend_tiles(smaller, x, tiling), smaller(x), atol=1e-5, rtol=0)


@given(st.integers(1, 40), st.integers(0, 20), st.booleans(), st.booleans())
def test_weights_are_positive_and_fall_only_where_asked(length: int, border: int, at_start: bool, at_end: bool) -> None:
    weights = fade(length, border, at_start=at_start, at_end=at_end)
    assert ((weights > 0) & (weights <= 1)).all()
    if not at_start and not at_end:
        assert (weights == 1).all()
    if at_start and border > 1:
        assert weights[0] == pytest.approx(1 / border * (min(1.0, length / border) if at_end else 1))


def test_seams_are_smooth() -> None:
    """Tiles that disagree by 1 are blended in small steps, right up to the borders of the image."""
    tiles: list[Tensor] = []

    def disagreeing(x: Tensor) -> Tensor:
        tiles.append(x)
        return torch.full_like(x, float(len(tiles) % 2))

    blended = blend_tiles(disagreeing, torch.zeros(1, 1, 40, 200), Tiling(64, 32))

    assert len(tiles) == 6
    assert blended.diff(dim=-1).abs().max() < 1.5 / 16  # the blend is 16 wide
    assert blended.diff(dim=-2).abs().max() < 1e-6
    assert blended.min() == 0
    assert blended.max() == 1


@pytest.mark.parametrize(("height", "width"), [(8, 12), (16, 16), (2, 16)])
def test_what_fits_into_a_tile_is_bit_for_bit_untiled(autoencoder: AutoEncoder, height: int, width: int) -> None:
    z = tensor("in.latents", (2, 16, height, width))
    assert torch.equal(tiled_decode(autoencoder, z, Tiling(16, 8)), autoencoder.decode(z))
    image, noise = tensor("in.image", (2, 3, 8 * height, 8 * width)), tensor("in.posterior", (2, 16, height, width))
    moments = tiled_moments(autoencoder, image, Tiling(128, 64))
    assert torch.equal(autoencoder.sample(moments, noise), autoencoder.encode(image, noise))
    moments = tiled_moments(autoencoder, image, Tiling(135, 64))
    assert torch.equal(autoencoder.sample(moments), autoencoder.encode(image))


@pytest.mark.parametrize(("height", "width"), [(18, 10), (10, 18), (14, 14)])
def test_tiled_is_near_untiled_and_has_its_shape(autoencoder: AutoEncoder, height: int, width: int) -> None:
    z = tensor("in.latents", (1, 16, height, width))
    whole, tiled = autoencoder.decode(z), tiled_decode(autoencoder, z, Tiling(12, 6))
    assert tiled.shape == whole.shape
    assert tiled.dtype == whole.dtype
    assert 0 < (tiled - whole).norm() / whole.norm() < 0.3  # noise has no structure that tiles could agree on
    image = tensor("in.image", (1, 3, 8 * height, 8 * width))
    whole, tiled = autoencoder.encode(image), autoencoder.sample(tiled_moments(autoencoder, image, Tiling(100, 50)))
    assert tiled.shape == whole.shape
    assert 0 < (tiled - whole).norm() / whole.norm() < 0.3


def test_a_tiled_image_does_not_depend_on_its_neighbours(autoencoder: AutoEncoder) -> None:
    z = tensor("in.latents", (2, 16, 14, 10))
    together = tiled_decode(autoencoder, z, Tiling(12, 6))
    for i in range(2):
        assert torch.equal(together[i : i + 1], tiled_decode(autoencoder, z[i : i + 1], Tiling(12, 6)))


def test_one_tile_of_one_image_is_computed_at_a_time() -> None:
    seen: list[tuple[int, ...]] = []

    def spy(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return x

    x = tensor("in.tiles", (2, 3, 40, 90)).bfloat16()
    assert blend_tiles(spy, x, Tiling(32, 16)).dtype == torch.bfloat16
    assert set(seen) == {(1, 3, 32, 32)}
    assert len(seen) == 2 * 2 * 5


@pytest.mark.parametrize("tiling", [Tiling(8, 9), Tiling(8, 0), Tiling(0, 0)])
def test_strides_that_leave_gaps_are_refused(tiling: Tiling) -> None:
    with pytest.raises(ValueError, match="the stride must be from 1 to the size"):
        blend_tiles(larger, torch.zeros(1, 1, 4, 4), tiling)
