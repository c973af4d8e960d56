"""Arguments for calls of a tiny pipeline: prompts, seeds, sizes and an input image."""

from __future__ import annotations

import torch
from PIL import Image

from helpers.golden import tensor

CPU = {"torch_dtype": torch.float32, "device": "cpu"}
PROMPTS = ["a cat that holds a sign", "A dog, 2 birds & 1 hat", "x"]
SEEDS = [11, 2**40, 0]
SMALL = {"height": 64, "width": 96, "num_inference_steps": 3}


def noise_image(width: int, height: int) -> Image.Image:
    values = tensor("in.image", (height, width, 3)).add(1).mul(127.5).to(torch.uint8)
    return Image.fromarray(values.numpy())
