"""Benchmarks: how fast the parts and the whole are here, beside what a user would run instead."""
