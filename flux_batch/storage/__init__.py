"""Bytes: one store over fsspec, one way to try again, local disk; knows no tensor and no cluster."""
