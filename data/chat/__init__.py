"""Chat templates: their text, the parts that they leave out, and where the assistant speaks."""
