"""Measurements, each a command: `python -m benchmarks.NAME`; results are committed in results/."""
