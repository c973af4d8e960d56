"""The two text encoders: prompts in, embeddings out.

No attention mask hides the padding, as in BFL, diffusers and DiffSynth-Studio: the model attends to pad tokens, and the
padded length changes the image. Only the tokenizers are imported from transformers, since its networks take longer to
import than torch.
"""
