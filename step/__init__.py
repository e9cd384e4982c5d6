"""The training step without the optimizer: its passes, its memory and its time."""
