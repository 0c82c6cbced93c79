"""Benchmarks: time, peak memory and error of ours and of the plain way, in one run."""
