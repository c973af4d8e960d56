"""Conditions beside the text, as plain maths: masks and images in the channels of tokens, kept latents, variants."""
