"""A merge: what was asked for, the files that come along, and the report on a text or on data."""
