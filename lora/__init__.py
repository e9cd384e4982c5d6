"""LoRA on frozen linear groups: the algebra, which projections get an update, and its files."""
