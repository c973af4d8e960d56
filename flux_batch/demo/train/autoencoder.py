"""The training of the demo model's autoencoder: images in, the same images out through latents of unit variance.

It trains on quarter images first, which are cheap. Then the statistics of the latents are folded into the convolutions
that write and read them, so that FLUX's own scale and shift hold. Last, the decoder trains alone on whole images.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_batch.demo.train.muon import MIN_SIDE, Optimizer
from flux_batch.demo.train.parts import AUTOENCODER
from flux_batch.demo.train.progress import Meter, Stage, load
from flux_batch.demo.world.captions import is_held_out, random_scene
from flux_batch.demo.world.drawing import draw
from flux_batch.model.autoencoder import AutoEncoder

_SIDE = 128
_CROP = 64
_BATCH = 8
_BATCH_OF_WHOLE = 4
_RATE = 1.5e-3
_MATRIX_RATE = 1.5e-2
# The weight of the KL term beside the mean absolute error of pixels: the largest that does not blur images.
_KL_WEIGHT = 8e-3
FOLD_IMAGES = 64
_LATENT_NOISE = 0.1


def train_autoencoder(folder: Path, seed: int, num_steps: int, device: torch.device) -> AutoEncoder:
    """Train, resume or load the autoencoder. Returns: the autoencoder with folded statistics."""
    model = make_autoencoder(seed).to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    first = Stage(folder, "autoencoder", num_steps, seed)
    if not first.is_done:
        _train_both(first, model, device)
        with torch.no_grad():
            fold_statistics(model, device, first.rng(num_steps))
        torch.save(model.state_dict(), folder / "autoencoder-folded.pt")
    second = Stage(folder, "decoder", num_steps // 6, seed)
    if second.is_done:
        model.load_state_dict(load(second.path)["model"])
    else:
        model.load_state_dict(load(folder / "autoencoder-folded.pt"))
        _train_decoder(second, model, device)
    return model.requires_grad_(False).eval()


def make_autoencoder(seed: int) -> AutoEncoder:
    """Return an untrained autoencoder with zero residual branches and upsampling that repeats pixels.

    Its decoder is nearly linear at first, and so learns colours first.
    """
    torch.manual_seed(seed)
    model = AutoEncoder(AUTOENCODER)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and name.endswith(("conv2", "proj_out", "upsample.conv")):
            nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if name.endswith("upsample.conv"):
                nn.init.dirac_(module.weight)
    return model


def _make_optimizer(model: nn.Module) -> Optimizer:
    """Return the optimizer of the trainable parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [p for p in trained if p.ndim == 4 and min(p.shape[0], p[0].numel()) >= MIN_SIDE]
    return Optimizer(model, matrices, _MATRIX_RATE, _RATE)


def _train_both(stage: Stage, model: AutoEncoder, device: torch.device) -> None:
    """Train encoder and decoder on quarter images."""
    optimizer = _make_optimizer(model)
    meter = Meter(stage)
    for step in stage.steps({"model": model, "optimizer": optimizer}):
        image = images(stage.rng(step), _BATCH, _CROP).to(device, memory_format=torch.channels_last)
        mean, logvar = model.encoder(image).chunk(2, dim=1)
        logvar = logvar.clamp(-20.0, 10.0)
        noise = torch.randn(mean.shape, generator=stage.generator(step)).to(device)
        output = model.decoder(mean + torch.exp(0.5 * logvar) * noise)
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
        optimizer.update(_image_error(output, image) + _KL_WEIGHT * kl, stage.share_of_rate(step))
        meter.add(step, error=F.l1_loss(output, image).item(), kl=kl.item(), std=mean.std().item())


def _train_decoder(stage: Stage, model: AutoEncoder, device: torch.device) -> None:
    """Train the decoder on whole images and noisy latents. A transformer's latents differ from the encoder's."""
    model.encoder.requires_grad_(False)
    optimizer = _make_optimizer(model)
    meter = Meter(stage)
    for step in stage.steps({"model": model, "optimizer": optimizer}):
        image = images(stage.rng(step), _BATCH_OF_WHOLE, _SIDE).to(device, memory_format=torch.channels_last)
        with torch.no_grad():
            latents = model.encode(image)
            latents = latents + _LATENT_NOISE * torch.randn(latents.shape, generator=stage.generator(step)).to(device)
        output = model.decode(latents)
        optimizer.update(_image_error(output, image), 0.4 * stage.share_of_rate(step))
        meter.add(step, error=F.l1_loss(output, image).item())


def _image_error(output: Tensor, target: Tensor) -> Tensor:
    """Return the error of pixels and of the differences between neighbours, which are the edges.

    The square finds colours fast, the absolute value makes flat areas flat.
    """
    edges = sum(F.l1_loss(output.diff(dim=axis), target.diff(dim=axis)) for axis in (2, 3))
    return 0.5 * F.l1_loss(output, target) + 0.25 * edges + 2.0 * F.mse_loss(output, target)


def fold_statistics(model: AutoEncoder, device: torch.device, rng: random.Random) -> None:
    """Change the weights so that scaled latents have mean 0 and variance 1 a channel. The images stay the same.

    The variance is that of the means plus that of samples around them, so that an unused channel stays small. The
    encoder's last convolution writes z = a z' + b, and the decoder's first one inverts it. This is exact except at the
    border, where the decoder still pads with 0; the training of the decoder corrects that.
    """
    image = images(rng, FOLD_IMAGES, _SIDE).to(device, memory_format=torch.channels_last)
    moments = torch.cat([model.encoder(part) for part in torch.split(image, 8)])
    mean, logvar = moments.chunk(2, dim=1)
    centre = mean.mean(dim=(0, 2, 3))
    spread = (mean.var(dim=(0, 2, 3)) + logvar.exp().mean(dim=(0, 2, 3))).sqrt()
    gain = 1.0 / (AUTOENCODER.scale_factor * spread)
    offset = AUTOENCODER.shift_factor - gain * centre
    writer, reader = model.encoder.conv_out, model.decoder.conv_in
    assert writer.bias is not None
    assert reader.bias is not None
    half = AUTOENCODER.z_channels
    writer.weight[:half] *= gain[:, None, None, None]
    writer.bias[:half] = writer.bias[:half] * gain + offset
    writer.bias[half:] += 2 * gain.log()
    reader.bias -= (reader.weight * (offset / gain)[None, :, None, None]).sum(dim=(1, 2, 3))
    reader.weight /= gain[None, :, None, None]


def images(rng: random.Random, count: int, side: int) -> Tensor:
    """Return drawn images, or crops of them if `side` is less than SIDE: (count, 3, side, side) in [-1, 1]."""
    return torch.stack([to_tensor(crop) for crop in _drawn(rng, count, side)])


def _drawn(rng: random.Random, count: int, side: int) -> Iterator[np.ndarray]:
    """Yield crops of drawn images: uint8 (side, side, 3)."""
    for _ in range(count):
        scene = random_scene(rng)
        while is_held_out(scene):
            scene = random_scene(rng)
        image = np.asarray(draw(scene, _SIDE, _SIDE, rng))
        top, left = (int(rng.random() * (_SIDE - side + 1)) for _ in range(2))
        yield image[top : top + side, left : left + side]


def to_tensor(image: np.ndarray) -> Tensor:
    """Return the tensor of an image: uint8 (h, w, 3) -> (3, h, w) in [-1, 1]."""
    return torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 127.5 - 1.0
