"""A run's output folder: resolved config, atomic checkpoints, metrics, model card."""
