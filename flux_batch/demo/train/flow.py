"""Trains the transformer of the demo model: flow matching, then guidance distilled into the value it embeds.

Until `GUIDED_FROM` of the steps the model learns the velocity of the data whatever guidance it is told. From then on
guidance 1 goes on with that, and every other guidance g learns what classifier-free guidance would give: the velocity
for the empty prompt plus `1 + GUIDANCE_GAIN (g - 1)` times the way from there to the velocity for the prompt.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flux_batch.demo.train.latents import SIZES, Pool, token_weights
from flux_batch.demo.train.muon import Optimizer
from flux_batch.demo.train.parts import TRANSFORMER
from flux_batch.demo.train.progress import Meter, Stage, load
from flux_batch.demo.train.sight import Sight, token_answers
from flux_batch.demo.train.world import training_text
from flux_batch.model.sampling import position_ids
from flux_batch.model.text import ClipEncoder, T5Encoder
from flux_batch.model.transformer import Flux

MATRIX_RATE = 2e-2
RATE = 2e-3
EMA_DECAY = 0.999
# Image tokens of a step; images of other sizes come in batches of as many tokens.
TOKENS = 64 * 64
# T5 lengths and the share of a full batch a step has at each.
LENGTHS = (
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
# Mean and spread of the logit of the time. Flat colours are seen through much noise: what stands where is decided at
# times above 0.85, which a third of all steps must therefore see.
LOGIT_MEAN, LOGIT_STD = 1.2, 1.3
# Things cover a tenth of an image and have most of its facts.
THING_WEIGHT = 4.0
# How much it counts whether a layer in the middle knows what stands where.
SIGHT_WEIGHT = 0.1
# Shares of the steps at which the learning rate begins to fall and guidance is added.
LEVEL_UNTIL = 0.25
GUIDED_FROM = 0.85
GUIDANCE_GAIN = 0.5
MAX_GUIDANCE = 6.0


@dataclass(frozen=True, slots=True)
class Batch:
    """Clean tokens (b, n, 64), how much the error of each counts (b, n), what each shows (b, n, 3), and texts."""

    clean: Tensor
    weights: Tensor
    answers: Tensor
    words: list[str]
    length: int
    width: int
    height: int


class Trainer:
    """The transformer, its running mean, its optimizers."""

    def __init__(
        self,
        clip: ClipEncoder,
        t5: T5Encoder,
        seed: int,
        device: torch.device,
        products: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(seed)
        self.clip, self.t5, self.device, self.products = clip, t5, device, products
        self.model = initialise(Flux(TRANSFORMER)).to(device)
        self.mean = copy.deepcopy(self.model).requires_grad_(False)
        matrices = [p for name, p in self.model.named_parameters() if is_inner_matrix(name, p)]
        self.sight = Sight(self.model).to(device)
        self.optimizer = Optimizer(nn.ModuleList([self.model, self.sight]), matrices, MATRIX_RATE, RATE, products)

    def start_from(self, transformer: Flux) -> None:
        """Take over the weights of a transformer of the same width; blocks that it has not change nothing at first."""
        for model in (self.model, self.mean):
            told = model.load_state_dict(transformer.state_dict(), strict=False)
            if told.unexpected_keys or not all(key.startswith("single_blocks.") for key in told.missing_keys):
                raise ValueError(f"a transformer of other parts: {[*told.unexpected_keys, *told.missing_keys][0]}")

    def compile(self) -> None:
        """Have the blocks that are trained compiled, for all sizes at once."""
        for block in (*self.model.double_blocks, *self.model.single_blocks):
            block.compile(dynamic=True)

    def narrow(self) -> torch.autocast:
        """Multiply in `products` inside."""
        return torch.autocast(self.device.type, self.products, enabled=self.products != torch.float32)

    def state(self) -> dict[str, Any]:
        """Return what has to be kept to take training up again."""
        return {"model": self.model, "mean": self.mean, "sight": self.sight, "optimizer": self.optimizer}

    def velocity(
        self, model: Flux, batch: Batch, noisy: Tensor, time: Tensor, guidance: Tensor, words: list[str]
    ) -> Tensor:
        """Ask a model for the velocity of a batch with these texts."""
        different = list(dict.fromkeys(words))
        rows = torch.tensor([different.index(word) for word in words])
        with torch.no_grad():
            txt = self.t5(different, batch.length)[rows]
            y = self.clip(different)[rows]
        ids = position_ids(batch.length, batch.height // 8, batch.width // 8).to(self.device)
        made: Tensor = model(noisy, txt, model.position_table(ids), time, y, guidance)
        return made

    def loss(self, batch: Batch, source: torch.Generator, *, guided: bool) -> tuple[Tensor, Tensor]:
        """Return the weighted means of the squared error of the velocity, and of the error of `sight`."""
        with self.narrow():
            error = self.error(batch, source, guided=guided)
            return error, self.sight.loss(batch.answers, batch.weights)

    def error(self, batch: Batch, source: torch.Generator, *, guided: bool) -> Tensor:
        """Return the weighted mean of the squared error of the velocity."""
        count = len(batch.words)
        noise = torch.randn(batch.clean.shape, generator=source).to(self.device)
        time = torch.sigmoid(LOGIT_MEAN + LOGIT_STD * torch.randn(count, generator=source)).to(self.device)
        guidance = (1.0 + (MAX_GUIDANCE - 1.0) * torch.rand(count, generator=source)).to(self.device)
        noisy = torch.lerp(batch.clean, noise, time[:, None, None])
        wanted = noise - batch.clean
        if guided:
            half = count // 2
            guidance[half:] = 1.0
            wanted[:half] = self.guided_velocity(batch, noisy, time, guidance, half)
        made = self.velocity(self.model, batch, noisy, time, guidance, batch.words)
        error = (made.float() - wanted).square().mean(dim=-1)
        return (error * batch.weights).sum() / batch.weights.sum()

    @torch.no_grad()
    def guided_velocity(self, batch: Batch, noisy: Tensor, time: Tensor, guidance: Tensor, count: int) -> Tensor:
        """Return what classifier-free guidance makes of the running mean's velocities of the first images."""
        noisy, time = noisy[:count], time[:count]
        one = torch.ones(count, device=self.device)
        said = self.velocity(self.mean, batch, noisy, time, one, batch.words[:count])
        unsaid = self.velocity(self.mean, batch, noisy, time, one, [""] * count)
        scale = 1.0 + GUIDANCE_GAIN * (guidance[:count] - 1.0)
        return unsaid + scale[:, None, None] * (said - unsaid)

    def update(self, loss: Tensor, share: float, step: int) -> None:
        """Take one step down at a share of the full rates, and move the running mean."""
        self.optimizer.update(loss, share)
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.mean.parameters()), list(self.model.parameters()), 1 - decay)


def train_flow(folder: Path, trainer: Trainer, pools: list[Pool], seed: int, num_steps: int) -> Flux:
    """Train, or take up training, or read what is done: the running mean of the transformer."""
    stage = Stage(folder, "flow", num_steps, seed)
    if stage.is_done:
        trainer.mean.load_state_dict(load(stage.path)["mean"])
        return trainer.mean.eval()
    meter = Meter(stage)
    for step in stage.steps(trainer.state()):
        batch = make_batch(pools, stage.rng(step), step, trainer.device)
        guided = step >= GUIDED_FROM * num_steps
        loss, sight = trainer.loss(batch, stage.generator(step), guided=guided)
        trainer.update(loss + SIGHT_WEIGHT * sight, stage.share_of_rate(step, level_until=LEVEL_UNTIL), step)
        meter.add(step, loss=loss.item(), sight=sight.item())
    return trainer.mean.eval()


def make_batch(pools: list[Pool], rng: random.Random, step: int, device: torch.device) -> Batch:
    """Choose a size, a T5 length, images of that size and texts for them."""
    pool = rng.choices(pools, weights=[SIZES[pool.width, pool.height] for pool in pools])[0]
    length, share = LENGTHS[step % len(LENGTHS)]
    count = max(2, int(TOKENS / pool.tokens.shape[1] * share))
    places = [int(rng.random() * len(pool.scenes)) for _ in range(count)]
    return Batch(
        clean=pool.tokens[places].float().to(device),
        weights=torch.stack(
            [token_weights(pool.scenes[place], pool.width, pool.height, THING_WEIGHT) for place in places]
        ).to(device),
        answers=torch.stack([token_answers(pool.scenes[place], pool.width, pool.height) for place in places]).to(
            device
        ),
        words=[training_text(pool.scenes[place], rng).words for place in places],
        length=length,
        width=pool.width,
        height=pool.height,
    )


def initialise(model: Flux) -> Flux:
    """Start as a model that says nothing: every gate is open, and what lies behind it is 0, as is the last layer.

    Queries and keys begin with a random constant, so that attention depends on where tokens are before it depends on
    what they hold: places are learned sooner.
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


def is_inner_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Tell whether a parameter is a matrix from hidden states to hidden states, as those of attention and MLP are."""
    return parameter.ndim == 2 and "blocks" in name and "mod" not in name
