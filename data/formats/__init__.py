"""Layouts of records, and what a record of each means."""
