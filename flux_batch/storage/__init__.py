"""Bytes, tables and URLs: fsspec, pyarrow and pillow; knows no tensor and no cluster."""
