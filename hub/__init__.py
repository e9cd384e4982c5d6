"""Repositories of the Hugging Face hub: fetched into a folder here, and pushed from one."""
