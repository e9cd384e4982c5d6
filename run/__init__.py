"""A run's output folder: config, atomic checkpoints, metrics, model card; signals, trackers."""
