"""Storage of bytes: one store over fsspec, one retry policy, local disk; no tensors, no cluster."""
