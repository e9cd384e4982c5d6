"""Examples tokenized by confined processes, and their tokens on disk."""
