"""What the data and the model both know: rows of tokens."""
