"""Bytes: one store over fsspec, one retry policy, local disk; knows no tensor and no cluster."""
