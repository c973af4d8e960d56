"""The training of the demo model's text encoders, to classify the facts in a text.

The transformer can read whatever a linear layer can read from T5's state of each token and from CLIP's pooled vector.
The encoders stay fixed afterwards, so that the transformer trains on fixed states.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_batch.demo.train.muon import MIN_SIDE, Optimizer
from flux_batch.demo.train.parts import CLIP_WIDTH, T5_WIDTH, clip_config, t5_config
from flux_batch.demo.train.progress import Meter, Stage, load
from flux_batch.demo.train.tokenizers import write_clip_tokenizer, write_t5_tokenizer
from flux_batch.demo.train.world import FACTS, training_scene, training_text
from flux_batch.demo.world.captions import captions
from flux_batch.model.text.clip import ClipEncoder, ClipModel, clip_params
from flux_batch.model.text.t5 import T5Encoder, T5Model, t5_params

_RATE = 2e-3
_MATRIX_RATE = 1e-2
# T5 lengths, used in turn, and the number of texts for each: the amount of padding must not matter.
_T5_LENGTHS = ((40, 96), (64, 64), (40, 96), (96, 48), (64, 64), (192, 24), (40, 96), (512, 8))
_NUM_CAPTIONS = 4000
_CAPTION_SEED = 0


class _FactReader(nn.Module):
    """A linear classifier for each fact: (..., width) -> logits (..., answers) for each fact."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.widths = [len(fact.answers) for fact in FACTS]
        self.linear = nn.Linear(width, sum(self.widths))

    def forward(self, states: Tensor) -> list[Tensor]:
        return list(self.linear(states).split(self.widths, dim=-1))


def train_text(folder: Path, seed: int, num_steps: int, device: torch.device) -> tuple[ClipEncoder, T5Encoder]:
    """Train, resume or load both encoders. Returns: the encoders, rounded to bfloat16 as they are shipped."""
    torch.manual_seed(seed)
    clip, t5 = _make_encoders(folder)
    stage = Stage(folder, "text", num_steps, seed)
    models = nn.ModuleDict({"clip": clip.model, "t5": t5.model}).to(device).eval()  # eval: no dropout
    if stage.is_done:
        models.load_state_dict(load(stage.path)["models"])
    else:
        _train_encoders(stage, models, clip, t5, device)
    with torch.no_grad():
        for parameter in models.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    models.requires_grad_(False)
    return clip, t5


def _make_encoders(folder: Path) -> tuple[ClipEncoder, T5Encoder]:
    """Train the tokenizers, which takes seconds, and return untrained encoders for their vocabularies."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

    texts = [caption.text for caption in captions(_NUM_CAPTIONS, _CAPTION_SEED)]
    for name in ("tokenizer", "tokenizer_2"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    clip_vocabulary = write_clip_tokenizer(folder / "tokenizer", texts)
    t5_vocabulary = write_t5_tokenizer(folder / "tokenizer_2", texts)
    clip_tokenizer: Any = CLIPTokenizer.from_pretrained(str(folder / "tokenizer"))
    t5_tokenizer: Any = T5Tokenizer.from_pretrained(str(folder / "tokenizer_2"))
    # transformers draws the weights that training starts from.
    drawn = CLIPTextModel(CLIPTextConfig(**clip_config(clip_vocabulary))).state_dict()
    clip = ClipModel(clip_params({name: value.shape for name, value in drawn.items()}, clip_config(clip_vocabulary)))
    clip.load_state_dict(drawn)
    drawn = T5EncoderModel(T5Config(**t5_config(t5_vocabulary))).state_dict()
    del drawn["encoder.embed_tokens.weight"]  # a second name of shared.weight
    t5 = T5Model(t5_params({name: value.shape for name, value in drawn.items()}, t5_config(t5_vocabulary)))
    t5.load_state_dict(drawn)
    return ClipEncoder(clip_tokenizer, clip), T5Encoder(t5_tokenizer, t5)


def _train_encoders(
    stage: Stage, models: nn.ModuleDict, clip: ClipEncoder, t5: T5Encoder, device: torch.device
) -> None:
    """Train both encoders together with linear classifiers of the facts."""
    readers = nn.ModuleDict({"clip": _FactReader(CLIP_WIDTH), "t5": _FactReader(T5_WIDTH)}).to(device)
    both = nn.ModuleDict({"models": models, "readers": readers})
    matrices = [p for name, p in models.named_parameters() if p.ndim == 2 and "embed" not in name and "layer" in name]
    optimizer = Optimizer(both, [p for p in matrices if min(p.shape) >= MIN_SIDE], _MATRIX_RATE, _RATE)
    meter = Meter(stage)
    for step in stage.steps({"models": models, "readers": readers, "optimizer": optimizer}):
        rng = stage.rng(step)
        length, count = _T5_LENGTHS[step % len(_T5_LENGTHS)]
        texts = [training_text(training_scene(rng), rng, empty_share=0.02) for _ in range(count)]
        words = [text.words for text in texts]
        answers = torch.tensor([text.answers for text in texts], device=device)
        states = t5(words, length)
        num_tokens = [len(ids) for ids in t5.tokenizer(words).input_ids]
        is_text = torch.arange(length)[None] < torch.tensor(num_tokens)[:, None]
        rows = torch.arange(count)[:, None].expand(-1, length)[is_text]
        t5_loss, t5_right = _loss_and_hits(readers["t5"](states[is_text.to(device)]), answers[rows.to(device)])
        clip_loss, clip_right = _loss_and_hits(readers["clip"](clip(words)), answers)
        optimizer.update(t5_loss + clip_loss, stage.share_of_rate(step))
        meter.add(step, t5=t5_loss.item(), t5_right=t5_right, clip=clip_loss.item(), clip_right=clip_right)


def _loss_and_hits(logits: list[Tensor], answers: Tensor) -> tuple[Tensor, float]:
    """Return the mean cross entropy, and the share of states with all facts right."""
    losses = [F.cross_entropy(part, answers[:, fact]) for fact, part in enumerate(logits)]
    hits = torch.stack([part.argmax(dim=-1) == answers[:, fact] for fact, part in enumerate(logits)])
    return torch.stack(losses).mean(), float(hits.all(dim=0).float().mean())
