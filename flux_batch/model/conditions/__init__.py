"""Conditions beside the text: masks, control images, reference images, image prompts, and the variants of FLUX.1."""
