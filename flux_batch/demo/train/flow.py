"""The training of the demo model's transformer: flow matching, then distillation of guidance into its embedding.

For the first share `_GUIDED_FROM` of the steps the model learns the velocity of the data at every guidance. After that,
guidance 1 still learns it, and every other guidance g learns the result of classifier-free guidance: the velocity for
the empty prompt plus `1 + GUIDANCE_GAIN (g - 1)` times its difference to the velocity for the prompt.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flux_batch.demo.train.auxiliary_head import AuxiliaryHead, token_classes
from flux_batch.demo.train.latents import SIZES, Pool, token_weights
from flux_batch.demo.train.muon import Optimizer
from flux_batch.demo.train.parts import TRANSFORMER
from flux_batch.demo.train.progress import Meter, Stage, load
from flux_batch.demo.train.world import training_text
from flux_batch.model.conditions.reference import Reference, placed
from flux_batch.model.optimize.compile import apply_compile
from flux_batch.model.sampling import position_ids
from flux_batch.model.text.clip import ClipEncoder
from flux_batch.model.text.t5 import T5Encoder
from flux_batch.model.transformer import Flux

_MATRIX_RATE = 2e-2
_RATE = 2e-3
_EMA_DECAY = 0.999
# Image tokens in a step, for every image size.
TOKENS_A_STEP = 64 * 64
# T5 lengths, used in turn, and the share of a full batch for each.
_T5_LENGTHS = (
    (40, 1.0),
    (64, 0.8),
    (40, 1.0),
    (40, 1.0),
    (64, 0.8),
    (40, 1.0),
    (40, 1.0),
    (128, 0.6),
    (40, 1.0),
    (512, 0.2),
)
# Mean and deviation of the logit of the time. Flat colours are visible through much noise, so positions are decided at
# times above 0.85, and a third of all steps must be there.
_LOGIT_MEAN, _LOGIT_STD = 1.2, 1.3
# Things cover a tenth of an image and have most of its facts.
THING_WEIGHT = 4.0
# Weight of the auxiliary head's loss beside that of the velocity.
_AUXILIARY_WEIGHT = 0.1
# Shares of the steps after which the learning rate falls and guidance is added.
_LEVEL_UNTIL = 0.25
_GUIDED_FROM = 0.85
_GUIDANCE_GAIN = 0.5
_MAX_GUIDANCE = 6.0


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """A batch of images and texts.

    clean: tokens (b, n, 64); weights: of each token (b, n); classes: of the thing at each token (b, n, 3), for the
    auxiliary head; control: tokens (b, n, 64) of a control image, appended to the channels as in FLUX.1-Canny;
    reference: tokens of an image of the same size, which come before the image's as in FLUX.1-Kontext.
    """

    clean: Tensor
    weights: Tensor
    prompts: list[str]
    length: int
    width: int
    height: int
    classes: Tensor | None = None
    control: Tensor | None = None
    reference: Tensor | None = None


class Trainer:
    """The transformer, its moving average (EMA), its auxiliary head and their optimizer."""

    def __init__(
        self,
        clip: ClipEncoder,
        t5: T5Encoder,
        seed: int,
        device: torch.device,
        matmul_dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(seed)
        self.clip, self.t5, self.device, self.matmul_dtype = clip, t5, device, matmul_dtype
        self.model = initialise(Flux(TRANSFORMER)).to(device)
        self.mean = copy.deepcopy(self.model).requires_grad_(False)
        matrices = [p for name, p in self.model.named_parameters() if _is_inner_matrix(name, p)]
        self.auxiliary_head = AuxiliaryHead(self.model).to(device)
        self.optimizer = Optimizer(
            nn.ModuleList([self.model, self.auxiliary_head]), matrices, _MATRIX_RATE, _RATE, matmul_dtype
        )

    def start_from(self, transformer: Flux) -> None:
        """Load the weights of a transformer of the same width; blocks that it lacks have no effect at first."""
        for model in (self.model, self.mean):
            keys = model.load_state_dict(transformer.state_dict(), strict=False)
            if keys.unexpected_keys or not all(key.startswith("single_blocks.") for key in keys.missing_keys):
                first = [*keys.unexpected_keys, *keys.missing_keys][0]
                raise ValueError(f"the transformer must have the parts of the demo model's; one differs: {first}")

    def compile(self) -> None:
        """Compile the blocks of the trained model, for all sizes at once."""
        apply_compile(self.model, dynamic=True)

    def autocast(self) -> torch.autocast:
        """Return a context in which matrices are multiplied in `matmul_dtype`."""
        return torch.autocast(self.device.type, self.matmul_dtype, enabled=self.matmul_dtype != torch.float32)

    def state(self) -> dict[str, Any]:
        """Return the parts whose state is needed to resume training."""
        return {
            "model": self.model,
            "mean": self.mean,
            "auxiliary_head": self.auxiliary_head,
            "optimizer": self.optimizer,
        }

    def velocity(
        self, model: Flux, batch: TrainBatch, noisy: Tensor, time: Tensor, guidance: Tensor, prompts: list[str]
    ) -> Tensor:
        """Return the velocity that a model predicts for a batch with these prompts."""
        distinct = list(dict.fromkeys(prompts))
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts])
        with torch.no_grad():
            txt = self.t5(distinct, batch.length)[rows]
            y = self.clip(distinct)[rows]
        size = batch.height // 8, batch.width // 8
        img, references = noisy, tuple[Reference, ...]()
        if batch.control is not None:
            img = torch.cat((noisy, batch.control), dim=-1)
        if batch.reference is not None:
            img, references = torch.cat((batch.reference, noisy), dim=1), placed([size])
        ids = position_ids(batch.length, *size, references).to(self.device)
        velocity: Tensor = model(img, txt, model.position_table(ids), time, y, guidance)[:, -noisy.shape[1] :]
        return velocity

    def loss(self, batch: TrainBatch, source: torch.Generator, *, guided: bool) -> tuple[Tensor, Tensor]:
        """Return the losses of the velocity and of the auxiliary head, weighted means over tokens."""
        with self.autocast():
            error = self.error(batch, source, guided=guided)
            assert batch.classes is not None
            return error, self.auxiliary_head.loss(batch.classes, batch.weights)

    def error(
        self, batch: TrainBatch, source: torch.Generator, *, guided: bool, max_guidance: float = _MAX_GUIDANCE
    ) -> Tensor:
        """Return the weighted mean of the squared error of the velocity.

        Guidances are random, from 1 to `max_guidance`.
        """
        count = len(batch.prompts)
        noise = torch.randn(batch.clean.shape, generator=source).to(self.device)
        time = torch.sigmoid(_LOGIT_MEAN + _LOGIT_STD * torch.randn(count, generator=source)).to(self.device)
        guidance = (1.0 + (max_guidance - 1.0) * torch.rand(count, generator=source)).to(self.device)
        noisy = torch.lerp(batch.clean, noise, time[:, None, None])
        wanted = noise - batch.clean
        if guided:
            half = count // 2
            guidance[half:] = 1.0
            wanted[:half] = self.guided_velocity(batch, noisy, time, guidance, half)
        predicted = self.velocity(self.model, batch, noisy, time, guidance, batch.prompts)
        error = (predicted.float() - wanted).square().mean(dim=-1)
        return (error * batch.weights).sum() / batch.weights.sum()

    @torch.no_grad()
    def guided_velocity(self, batch: TrainBatch, noisy: Tensor, time: Tensor, guidance: Tensor, count: int) -> Tensor:
        """Return the moving average's velocities of the first images under classifier-free guidance."""
        noisy, time = noisy[:count], time[:count]
        one = torch.ones(count, device=self.device)
        conditional = self.velocity(self.mean, batch, noisy, time, one, batch.prompts[:count])
        unconditional = self.velocity(self.mean, batch, noisy, time, one, [""] * count)
        scale = 1.0 + _GUIDANCE_GAIN * (guidance[:count] - 1.0)
        return unconditional + scale[:, None, None] * (conditional - unconditional)

    def update(self, loss: Tensor, share: float, step: int) -> None:
        """Take one optimizer step at a share of full rates, and update the moving average."""
        self.optimizer.update(loss, share)
        decay = min(_EMA_DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.mean.parameters()), list(self.model.parameters()), 1 - decay)


def train_flow(folder: Path, trainer: Trainer, pools: list[Pool], seed: int, num_steps: int) -> Flux:
    """Train, resume or load the transformer. Returns: its moving average."""
    stage = Stage(folder, "flow", num_steps, seed)
    if stage.is_done:
        trainer.mean.load_state_dict(load(stage.path)["mean"])
        return trainer.mean.eval()
    meter = Meter(stage)
    for step in stage.steps(trainer.state()):
        batch = make_batch(pools, stage.rng(step), step, trainer.device)
        guided = step >= _GUIDED_FROM * num_steps
        loss, auxiliary_loss = trainer.loss(batch, stage.generator(step), guided=guided)
        trainer.update(
            loss + _AUXILIARY_WEIGHT * auxiliary_loss, stage.share_of_rate(step, level_until=_LEVEL_UNTIL), step
        )
        meter.add(step, loss=loss.item(), auxiliary=auxiliary_loss.item())
    return trainer.mean.eval()


def make_batch(pools: list[Pool], rng: random.Random, step: int, device: torch.device) -> TrainBatch:
    """Return a random batch: images of one size, a T5 length and prompts for them."""
    pool = rng.choices(pools, weights=[SIZES[pool.width, pool.height] for pool in pools])[0]
    length, share = _T5_LENGTHS[step % len(_T5_LENGTHS)]
    count = max(2, int(TOKENS_A_STEP / pool.tokens.shape[1] * share))
    numbers = [int(rng.random() * len(pool.scenes)) for _ in range(count)]
    return TrainBatch(
        clean=pool.tokens[numbers].float().to(device),
        weights=torch.stack(
            [token_weights(pool.scenes[number], pool.width, pool.height, THING_WEIGHT) for number in numbers]
        ).to(device),
        classes=torch.stack([token_classes(pool.scenes[number], pool.width, pool.height) for number in numbers]).to(
            device
        ),
        prompts=[training_text(pool.scenes[number], rng).words for number in numbers],
        length=length,
        width=pool.width,
        height=pool.height,
    )


def initialise(model: Flux) -> Flux:
    """Return the model with weights for which it predicts 0: each branch ends in zeros behind an open gate.

    Queries and keys start with a random constant, so that attention first depends on the positions of tokens and only
    later on their content. Positions are then learned sooner.
    """
    hidden = model.params.hidden_size
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
        if name.endswith((".lin", "attn.proj", "linear2", "mlp.2")) or name.startswith("final_layer"):
            nn.init.zeros_(module.weight)
        if name.endswith(".lin"):
            module.bias.data.view(-1, 3, hidden)[:, 2] = 1.0
        if name.endswith(("attn.qkv", "linear1")):
            nn.init.normal_(module.bias.data[: 2 * hidden])
    return model


def _is_inner_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter is a matrix between hidden states, as in attention and MLP."""
    return parameter.ndim == 2 and "blocks" in name and "mod" not in name
