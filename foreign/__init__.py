"""What comes from others: files, the programs in them and their text, within bounds."""
