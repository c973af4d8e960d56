"""The images that a call takes: checked, as latents, and pasted back."""
