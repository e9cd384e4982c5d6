"""The Llama family: its config, its function in plain torch, and the same written out by hand."""
