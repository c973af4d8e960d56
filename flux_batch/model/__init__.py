"""The computation of FLUX, with torch, einops, safetensors and transformers.

It imports nothing from the other folders of this package.
"""
