"""The computation of FLUX: torch, einops, safetensors, and tokenizers of transformers; imports nothing else of ours."""
