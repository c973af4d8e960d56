"""The program that trains the demo model: `python -m flux_batch.demo.train WORK_FOLDER [--to MODEL_FOLDER]`.

It has seven stages: the autoencoder, the text encoders, the latents of the training images, the transformer, and three
LoRAs on it. Each keeps its state in the work folder and resumes from there. The default numbers of steps take some
hours on two CPU cores, an hour and a half of it for the transformer; more steps improve it. `--start MODEL_FOLDER`
skips the first two stages and continues from that model's transformer; `--flow-steps 0` leaves that unchanged.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from flux_batch.demo.train.adapters.blueprint import train_blueprint
from flux_batch.demo.train.adapters.canny import train_canny
from flux_batch.demo.train.adapters.kontext import train_kontext
from flux_batch.demo.train.autoencoder import train_autoencoder
from flux_batch.demo.train.flow import Trainer, train_flow
from flux_batch.demo.train.latents import make_pools
from flux_batch.demo.train.parts import save_weights, write_model
from flux_batch.demo.train.text import train_text
from flux_batch.pipeline.model_manager import ModelManager, locate_parts

_LORAS = {"blueprint": train_blueprint, "flux-canny": train_canny, "flux-kontext": train_kontext}


def main() -> None:
    """Train the stages that are not finished, and write the model."""
    arguments = parse_arguments()
    arguments.work.mkdir(parents=True, exist_ok=True)
    manager: Any = ModelManager("float32", arguments.device, locate_parts(arguments.start)) if arguments.start else None
    if manager:
        autoencoder, clip, t5 = manager.autoencoder, manager.clip, manager.t5
    else:
        autoencoder = train_autoencoder(arguments.work, arguments.seed, arguments.autoencoder_steps, arguments.device)
        clip, t5 = train_text(arguments.work, arguments.seed, arguments.text_steps, arguments.device)
    matmul_dtype = torch.bfloat16 if arguments.bfloat16 else torch.float32
    trainer = Trainer(clip, t5, arguments.seed, arguments.device, matmul_dtype)
    if manager:
        trainer.start_from(manager.transformer)
    if arguments.compile:
        trainer.compile()
    transformer = trainer.mean
    if arguments.flow_steps:
        pools = make_pools(arguments.work, autoencoder, arguments.images, arguments.seed, arguments.device)
        transformer = train_flow(arguments.work, trainer, pools, arguments.seed, arguments.flow_steps)
    loras = {}
    for name in arguments.loras:
        lora_trainer = Trainer(clip, t5, arguments.seed, arguments.device, matmul_dtype)
        lora_trainer.start_from(transformer)
        num_steps = getattr(arguments, f"{name.removeprefix('flux-')}_steps")
        loras[name] = _LORAS[name](arguments.work, lora_trainer, autoencoder, num_steps, arguments.seed)
    if arguments.to:
        write_model(arguments.to, arguments.start or arguments.work, transformer, autoencoder, clip, t5)
        for name, lora in loras.items():
            save_weights(arguments.to.with_name(f"{name}.safetensors"), lora)
        beside = f", and beside it {', '.join(f'{name}.safetensors' for name in loras)}" if loras else ""
        print(f"wrote {arguments.to}{beside}")


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(prog="python -m flux_batch.demo.train", description="Train the demo model.")
    parser.add_argument("work", type=Path, help="folder for the state of training, which resumes from it")
    parser.add_argument("--to", type=Path, help="new folder for the model, in the layout of diffusers")
    parser.add_argument("--start", type=Path, help="folder of such a model, to continue from its transformer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bfloat16", action="store_true", help="multiply in bfloat16: faster with AMX or on a GPU")
    parser.add_argument("--compile", action="store_true", help="torch.compile the transformer; needs a C++ compiler")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--autoencoder-steps", type=int, default=1800)
    parser.add_argument("--text-steps", type=int, default=1000)
    parser.add_argument("--images", type=int, default=12_288)
    parser.add_argument("--flow-steps", type=int, default=3400)
    parser.add_argument(
        "--loras", nargs="*", choices=_LORAS, default=list(_LORAS), help="the LoRAs to train (default: all)"
    )
    parser.add_argument("--blueprint-steps", type=int, default=400)
    parser.add_argument("--canny-steps", type=int, default=4500)
    parser.add_argument("--kontext-steps", type=int, default=6000)
    return parser.parse_args()


if __name__ == "__main__":
    main()
