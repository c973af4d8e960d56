"""The computation of FLUX: torch, einops, safetensors and transformers only; imports nothing else of this package."""
