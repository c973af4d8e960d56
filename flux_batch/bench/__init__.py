"""The benchmarks: the speed of the parts and the whole, beside other programs for the same work."""
