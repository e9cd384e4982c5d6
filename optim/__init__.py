"""AdamW over flat arenas, its moments in CUDA unified memory, and learning-rate schedules."""
