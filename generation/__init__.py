"""What continues a prompt: the cache of keys and values, a pass for each new token, the choice of the token."""
