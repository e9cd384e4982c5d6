"""The Llama family as found in a checkpoint directory: config, model, loss, loading, generation."""
