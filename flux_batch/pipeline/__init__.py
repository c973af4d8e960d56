"""Prompts -> images: FluxImagePipeline, ModelManager; the one translator of words into what model/ computes."""
