"""Files -> tensors: formats, quantisations and spellings of keys."""
