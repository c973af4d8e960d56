"""What FLUX computes: torch, einops, safetensors and transformers only; imports nothing else of this package."""
