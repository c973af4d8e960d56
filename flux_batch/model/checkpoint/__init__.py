"""Files to tensors: formats, quantizations and names of keys."""
