"""Repositories of the Hugging Face hub: what has an id there becomes a folder here, and back."""
