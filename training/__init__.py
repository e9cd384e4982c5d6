"""A training run under way: its state, and everything that it does besides its steps."""
