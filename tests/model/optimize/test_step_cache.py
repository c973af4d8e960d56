"""The first-block cache: the steps and images that it reuses, and no change without reuse."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from flux_batch.model.optimize.step_cache import StepCache, relative_change
from flux_batch.model.sampling import Velocity, denoise
from flux_batch.model.transformer import Denoiser, Flux, PromptEmbeds
from helpers import three_images
from helpers.golden import FLUX, filled
from helpers.three_images import NEGATIVE, NOISE, TEXT

STEPS = 8
# A threshold above every change.
ALWAYS = 100.0
SIGMAS = torch.linspace(1.0, 0.0, STEPS + 1)


@pytest.fixture(scope="module")
def model() -> Flux:
    return filled(Flux(FLUX))


def denoiser(
    model: Flux, images: slice | list[int] = slice(None), text: PromptEmbeds = TEXT, sigmas: Tensor = SIGMAS
) -> Denoiser:
    return three_images.denoiser(model, sigmas, images, text)


def caching(model: Flux, threshold: float, images: slice | list[int] = slice(None), **options: Any) -> StepCache:
    return StepCache(denoiser(model, images, **options), threshold)


def walk(velocity: Velocity, images: slice | list[int] = slice(None), **options: Any) -> Tensor:
    """Denoise some of the three images together."""
    return denoise(velocity, NOISE[images], SIGMAS, **options)


class Counting:
    """A model that records the number of images in its later blocks at each call."""

    def __init__(self, model: Flux, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images: list[int] = []
        later_blocks = model.later_blocks

        def counted(img: Tensor, *others: Tensor) -> Tensor:
            self.images.append(len(img))
            return later_blocks(img, *others)

        monkeypatch.setattr(model, "later_blocks", counted)


def thresholds_of(model: Flux, image: int) -> list[float]:
    """Return the change of the first block at each step of one image from the previous step."""
    seen: list[Tensor] = []

    class Watching(StepCache):
        def _to_compute(self, step: int, first_block: Tensor) -> list[int]:
            seen.append(first_block)
            return super()._to_compute(step, first_block)

    walk(Watching(denoiser(model, [image]), 0.0), [image])
    return [float(relative_change(new, old)) for old, new in pairwise(seen)]


def test_at_0_nothing_is_reused_and_every_bit_is_the_same(model: Flux) -> None:
    cache = caching(model, 0.0)
    assert torch.equal(walk(cache), walk(denoiser(model)))
    assert (cache.num_reused, cache.num_passes) == (0, 3 * STEPS)


def test_above_every_change_all_but_the_first_and_the_last_step_are_reused(
    model: Flux, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = walk(denoiser(model))
    counting, cache = Counting(model, monkeypatch), caching(model, ALWAYS)
    result = walk(cache)
    assert counting.images == [3, 3]
    assert (cache.num_reused, cache.num_passes) == (3 * (STEPS - 2), 3 * STEPS)
    assert result.isfinite().all()
    assert not torch.equal(result, plain)


def test_a_reused_step_adds_what_the_later_blocks_added(model: Flux) -> None:
    plain, cache = denoiser(model), caching(model, ALWAYS)
    assert torch.equal(cache(0, NOISE), plain(0, NOISE))

    def parts(step: int, img: Tensor) -> tuple[Tensor, Tensor]:
        modulations = plain.modulations(step)
        img, txt = model.first_block(model.img_in(img), plain.txt, modulations, plain.pe)
        return img, model.later_blocks(img, txt, modulations, plain.pe)

    before, after = parts(0, NOISE)
    img, _ = parts(1, 0.9 * NOISE)
    expected = model.last_layer(img + (after - before), plain.modulations(1))
    torch.testing.assert_close(cache(1, 0.9 * NOISE), expected, rtol=0, atol=1e-5)
    assert cache.num_reused == 3


def test_a_step_is_compared_with_the_last_computed_one_not_the_last(model: Flux) -> None:
    changes = thresholds_of(model, 0)
    middle = changes[1 : STEPS - 2]
    # Each step changes less than this from the previous one, so that comparison would reuse all steps for ever.
    cache = caching(model, 1.2 * max(middle), [0])
    walk(cache, [0])
    assert 0 < cache.num_reused < STEPS - 2


@pytest.mark.parametrize("share", [0.3, 0.7, 1.2])
def test_an_image_does_not_depend_on_its_neighbours(model: Flux, share: float) -> None:
    threshold = share * max(thresholds_of(model, 0))
    together = caching(model, threshold)
    result = walk(together)
    alone = [caching(model, threshold, [image]) for image in range(3)]
    for image, cache in enumerate(alone):
        torch.testing.assert_close(result[image : image + 1], walk(cache, [image]), rtol=0, atol=2e-5)
    assert together.num_reused == sum(cache.num_reused for cache in alone)
    pair = caching(model, threshold, [2, 0])
    torch.testing.assert_close(walk(pair, [2, 0]), result[[2, 0]], rtol=0, atol=2e-5)


def test_images_of_a_batch_are_computed_at_different_steps(model: Flux, monkeypatch: pytest.MonkeyPatch) -> None:
    threshold = sum(max(thresholds_of(model, image)) for image in range(3)) / 3
    counting = Counting(model, monkeypatch)
    walk(caching(model, threshold))
    assert any(0 < images < 3 for images in counting.images)
    assert (counting.images[0], counting.images[-1]) == (3, 3)


@pytest.mark.parametrize("steps", [1, 2])
def test_with_one_or_two_steps_nothing_is_reused(model: Flux, steps: int) -> None:
    sigmas = torch.linspace(1.0, 0.0, steps + 1)
    cache = caching(model, ALWAYS, sigmas=sigmas)
    result = denoise(cache, NOISE, sigmas)
    assert torch.equal(result, denoise(denoiser(model, sigmas=sigmas), NOISE, sigmas))
    assert cache.num_reused == 0


def test_both_passes_of_true_cfg_have_a_memory_of_their_own(model: Flux) -> None:
    scale = torch.tensor([2.0, 1.0, 0.5])
    expected = walk(denoiser(model), negative=denoiser(model, text=NEGATIVE), cfg_scale=scale)
    caches = caching(model, 0.0), caching(model, 0.0, text=NEGATIVE)
    assert torch.equal(walk(caches[0], negative=caches[1], cfg_scale=scale), expected)
    caches = caching(model, ALWAYS), caching(model, ALWAYS, text=NEGATIVE)
    result = walk(caches[0], negative=caches[1], cfg_scale=scale)
    assert [cache.num_passes for cache in caches] == [3 * STEPS] * 2
    # The image with scale 1 uses the positive pass unchanged.
    torch.testing.assert_close(result[1:2], walk(caching(model, ALWAYS, [1]), [1]), rtol=0, atol=2e-5)


def test_numbers_that_are_none_are_not_hidden(model: Flux) -> None:
    cache = caching(model, ALWAYS)
    cache(0, NOISE)
    broken = NOISE.clone()
    broken[1, 0, 0] = float("nan")
    result = cache(1, broken)
    assert result[[0, 2]].isfinite().all()
    assert result[1].isnan().any()
    assert cache.num_reused == 2


def test_a_change_is_a_share_of_each_image() -> None:
    old = torch.ones(2, 4, 8)
    new = old.clone()
    new[1] *= 1.25
    assert relative_change(new, old).tolist() == [0.0, 0.25]
    assert relative_change(new.half() * 60_000, old.half() * 60_000).isfinite().sum() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_works_in_every_dtype(dtype: torch.dtype) -> None:
    model = filled(Flux(FLUX)).to(dtype)
    text = PromptEmbeds(*(part.to(dtype) for part in TEXT))
    cache = caching(model, ALWAYS, text=text)
    result = denoise(cache, NOISE.to(dtype), SIGMAS)
    assert result.dtype == dtype
    assert result.isfinite().all()
    assert cache.num_reused == 3 * (STEPS - 2)


@pytest.mark.parametrize(
    "stance", ["force_eager", pytest.param("default", marks=[pytest.mark.compiled, pytest.mark.long])]
)
def test_it_works_over_compiled_blocks(stance: str) -> None:
    # One block of each kind is replaced by the result of torch.compile, with the eager backend.
    model = filled(Flux(FLUX))
    plain = walk(caching(model, 0.3))
    compiled: Callable[..., Any] = torch.compile(backend="eager", dynamic=True)
    for blocks in (model.double_blocks, model.single_blocks):
        blocks[0] = compiled(blocks[0])
    with torch.compiler.set_stance(stance):
        torch.testing.assert_close(walk(caching(model, 0.3)), plain, rtol=0, atol=1e-5)
