"""Benchmarks of the parts and of whole jobs, compared with other programs."""
