"""Benchmarks of the parts that grow with a run: its plan, its state, its driver, its requests."""
