"""Where the demo model and its LoRA lie: whole, inside the package; knows nothing of what is in them."""

from __future__ import annotations

from pathlib import Path


def demo_model_folder() -> Path:
    """Return the folder of the demo model, in the layout of diffusers; `python -m flux_batch.demo.train` made it."""
    return Path(__file__).with_name("flux-demo")


def demo_lora_path() -> Path:
    """Return the demo LoRA, in the layout of PEFT: whatever the prompt says, as a white drawing on blue."""
    return Path(__file__).with_name("blueprint.safetensors")
