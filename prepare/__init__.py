"""What a run will do: flags, data and checkpoint, checked before a model is loaded."""
