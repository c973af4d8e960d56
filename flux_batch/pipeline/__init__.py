"""From prompts to images: FluxImagePipeline and ModelManager, which translate public arguments for model/."""
