"""A checkpoint folder: opened, loaded, stored in NF4, merged, written."""
