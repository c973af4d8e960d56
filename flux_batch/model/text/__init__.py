"""The two text encoders: prompts in, embeddings out; they know no image.

No attention mask is passed for padding, as in BFL, diffusers and DiffSynth-Studio: pad tokens are tokens like others,
and the pad length changes the image. Imports of transformers are those of its tokenizers alone: its networks take
longer to import than torch.
"""
