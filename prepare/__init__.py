"""A run before it begins: flags, checkpoint, adapter and data, checked before a model is loaded."""
