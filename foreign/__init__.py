"""What comes from others, files and the programs in them, read and run within bounds."""
