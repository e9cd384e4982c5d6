"""Measurements: `python -m benchmarks` lists them; their results are committed in results/."""
