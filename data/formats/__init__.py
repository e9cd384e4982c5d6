"""Layouts of records, and the examples that records are read as."""
