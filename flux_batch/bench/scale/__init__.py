"""Benchmarks of what grows with a run: its plan, its state, its driver, its requests."""
