"""`torch.compile` of the repeated blocks: a cold start costs one block of each kind and the last, not the whole model.

The model is built plain and changed from here. The first size is compiled for itself, the second as any size, which
then serves all others; a batch of one and larger ones are compiled apart. What is compiled is kept in torch's own cache
(TORCHINDUCTOR_CACHE_DIR), which the processes of a machine share.

The autoencoder's decoder is left as it is. Its blocks are hardly repeated: five widths make six graphs and more, where
torch keeps eight of a function and then gives up. On two busy CPU cores a quarter as wide as FLUX.1's took 28 to 41 s
to compile and was 4 to 13 % slower than without, its convolutions being most of the work. On a GPU it was not measured;
published are 27 ms instead of 117, of some 3.5 s an image.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from flux_batch.model.transformer import Flux


def compile_blocks(model: Flux) -> None:
    """Let the blocks of a transformer be compiled when they are first run.

    Raises: ValueError if this machine lacks what that needs, which would else come up with the first image.
    """
    try:
        probe: Callable[[Tensor], Tensor] = torch.compile(lambda x: x + 1)
        probe(torch.zeros(2, device=model.img_in.weight.device))
    except Exception as error:  # of many classes, by what is missing: a C++ compiler, Triton, headers, a folder
        raise ValueError(f"torch.compile does not work here: {error}") from error
    # The rotation of heads on a CPU, left out on purpose: see model/rope.py.
    warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex", UserWarning)
    for blocks in model.blocks:
        for block in blocks:
            block.compile()
