"""Benchmarks: what a user waits for, beside a floor measured in the same run. `make bench` runs them all."""
