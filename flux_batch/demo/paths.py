"""The paths of the demo job, its model and its LoRAs in the package."""

from __future__ import annotations

from pathlib import Path


def demo_model_folder() -> Path:
    """Return the folder of the demo model, in the layout of diffusers.

    `python -m flux_batch.demo.train` made it.
    """
    return Path(__file__).with_name("flux-demo")


def demo_job_path() -> Path:
    """Return the path of the job file of `flux-batch demo`."""
    return Path(__file__).with_name("job.yaml")


def demo_lora_path(name: str) -> Path:
    """Return the path of a LoRA of the demo model.

    name: `blueprint`, in PEFT's layout, draws any prompt in white on blue; `flux-canny` and `flux-kontext`, in the
    layout of BFL's control LoRAs, make the model read edges, or an image to edit.
    """
    return Path(__file__).parent / "loras" / f"{name}.safetensors"
