"""A data file as records, each with the place it came from."""
