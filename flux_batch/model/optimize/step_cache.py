"""The first-block cache: a step that resembles the last computed one reuses most of it. Lossy.

The first block is always run. If its addition to the tokens of an image has hardly changed since the last step at which
that image was computed in full, the later blocks are skipped, and their addition at that step is reused.
Source of the idea: chengzeyi/ParaAttention; diffusers 0.42.1, hooks/first_block_cache.py decides for a whole batch.
Letters: b batch, n image tokens, k images of the batch to compute.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flux_batch.model.layers import finite
from flux_batch.model.transformer import Denoiser


@dataclass(slots=True)
class _Additions:
    """The additions to the image tokens at the last full computation of each image: (b, n, hidden) each."""

    first_block: Tensor
    later_blocks: Tensor

    def update(self, images: Tensor, new: _Additions) -> None:
        """Replace the additions of some images: (k,) indices."""
        self.first_block.index_copy_(0, images, new.first_block)
        self.later_blocks.index_copy_(0, images, new.later_blocks)


class StepCache:
    """A transformer for one denoising loop that reuses steps: call it with each step in turn.

    threshold: the largest change, as a share of the mean magnitude, at which a step is reused, 0..1; at 0 no step is
    reused, and the result is that of the model. The decision is made for each image of the batch alone, so that an
    image does not depend on its neighbours. The first and the last step and those at which a side network begins or
    ends are always computed.
    `num_reused` counts the steps, of all images, whose later blocks were not run; `num_passes` counts all steps.
    """

    def __init__(self, model: Denoiser, threshold: float) -> None:
        self.model = model
        self.threshold = threshold
        self.num_passes = 0
        self.num_reused = 0
        self._last: _Additions | None = None

    def __call__(self, step: int, img: Tensor) -> Tensor:
        """Return the velocity, for the arguments of `Denoiser`."""
        denoiser, prompt = self.model, self.model.prompt
        flux, pe, modulations = denoiser.model, denoiser.pe, denoiser.modulations(step)
        tokens = flux.img_in(img)
        after_first, txt = flux.first_block(tokens, denoiser.txt, modulations, pe, prompt)
        first_block = after_first - tokens
        images = self._to_compute(step, first_block)
        self.num_passes += len(img)
        self.num_reused += len(img) - len(images)
        residuals = denoiser.residuals(step, img) if images else None
        if self._last is None or len(images) == len(img):
            done = flux.later_blocks(after_first, txt, modulations, pe, residuals, prompt)
            self._last = _Additions(first_block, finite(done - after_first))
            return flux.last_layer(done, modulations)
        reused = finite(after_first + self._last.later_blocks)
        if images:
            # A tensor of indices, because a list would be copied to the device for each tensor that it indexes.
            chosen = torch.tensor(images, device=img.device)
            some, some_txt = after_first.index_select(0, chosen), txt.index_select(0, chosen)
            added = None if residuals is None else residuals.select(chosen)
            attended = None if prompt is None else prompt.select(chosen)
            done = flux.later_blocks(some, some_txt, modulations.select(chosen), pe, added, attended)
            self._last.update(chosen, _Additions(first_block.index_select(0, chosen), finite(done - some)))
            reused.index_copy_(0, chosen, done)
        return flux.last_layer(reused, modulations)

    def _to_compute(self, step: int, first_block: Tensor) -> list[int]:
        """Return the indices of the images whose later blocks must run. Waits for the device."""
        nets = self.model.side_networks
        if self._last is None or step >= self.model.num_steps - 1 or (nets and nets.changes(step)):
            return list(range(len(first_block)))
        change = relative_change(first_block, self._last.first_block).tolist()
        # An image with NaN is computed, so that its NaN reaches the check at the end of the pipeline.
        return [image for image, share in enumerate(change) if not share < self.threshold]


def relative_change(new: Tensor, old: Tensor) -> Tensor:
    """Return each image's mean magnitude of the change, divided by that of `old`: (b, n, c) -> (b,) fp32."""
    changed = (new - old).abs().mean(dim=(1, 2), dtype=torch.float32)
    return changed / old.abs().mean(dim=(1, 2), dtype=torch.float32)
