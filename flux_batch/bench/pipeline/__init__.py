"""Benchmarks of one pipeline in one process: stages, operations, peers, lossy modes."""
