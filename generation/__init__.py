"""What continues a prompt: the cache of keys and values, a pass and a choice for each new token."""
