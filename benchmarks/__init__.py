"""Benchmarks of incdump: ratios measured in one run, on real target processes. See `benchmarks.__main__`."""
