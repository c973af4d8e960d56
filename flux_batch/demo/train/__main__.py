"""Makes the demo model: `python -m flux_batch.demo.train WORK_FOLDER [--to MODEL_FOLDER]`.

Five stages, each kept in the work folder and taken up again where it was stopped: the autoencoder, the text encoders,
the latents of the training images, the transformer, a LoRA on it. The numbers of steps are those that two CPU cores
take in an hour and a half; most of it is the transformer's, and more steps make it better. With `--start MODEL_FOLDER`
the first two stages are left out and the transformer goes on from that model's.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from flux_batch.demo.train.autoencoder import train_autoencoder
from flux_batch.demo.train.flow import Trainer, train_flow
from flux_batch.demo.train.latents import make_pools
from flux_batch.demo.train.lora import train_lora
from flux_batch.demo.train.parts import save_weights, write_model
from flux_batch.demo.train.text import train_text
from flux_batch.pipeline.model_manager import ModelManager, locate_parts


def main() -> None:
    """Train what is not trained yet and write the model."""
    given = arguments()
    given.work.mkdir(parents=True, exist_ok=True)
    manager: Any = ModelManager("float32", given.device, locate_parts(given.start)) if given.start else None
    if manager:
        autoencoder, clip, t5 = manager.autoencoder, manager.clip, manager.t5
    else:
        autoencoder = train_autoencoder(given.work, given.seed, given.autoencoder_steps, given.device)
        clip, t5 = train_text(given.work, given.seed, given.text_steps, given.device)
    pools = make_pools(given.work, autoencoder, given.images, given.seed, given.device)
    products = torch.bfloat16 if given.bfloat16 else torch.float32
    trainer = Trainer(clip, t5, given.seed, given.device, products)
    if manager:
        trainer.start_from(manager.transformer)
    if given.compile:
        trainer.compile()
    transformer = train_flow(given.work, trainer, pools, given.seed, given.flow_steps)
    artist = Trainer(clip, t5, given.seed, given.device, products)
    artist.start_from(transformer)
    lora = train_lora(given.work, artist, autoencoder, given.lora_steps, given.seed)
    if given.to:
        write_model(given.to, given.start or given.work, transformer, autoencoder, clip, t5)
        save_weights(given.to.with_name("blueprint.safetensors"), lora)
        print(f"wrote {given.to} and blueprint.safetensors beside it")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m flux_batch.demo.train", description="Train the demo model.")
    parser.add_argument("work", type=Path, help="folder for what training keeps; the same one takes it up again")
    parser.add_argument("--to", type=Path, help="new folder for the model, in the layout of diffusers")
    parser.add_argument("--start", type=Path, help="folder of a model like it whose transformer goes on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bfloat16", action="store_true", help="multiply in it: faster with AMX, or on a GPU")
    parser.add_argument("--compile", action="store_true", help="torch.compile the transformer: needs a C++ compiler")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--autoencoder-steps", type=int, default=1800)
    parser.add_argument("--text-steps", type=int, default=1000)
    parser.add_argument("--images", type=int, default=12_288)
    parser.add_argument("--flow-steps", type=int, default=3400)
    parser.add_argument("--lora-steps", type=int, default=400)
    return parser.parse_args()


if __name__ == "__main__":
    main()
