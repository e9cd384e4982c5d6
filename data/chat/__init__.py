"""Chat templates: what they write, what they leave out, and where in it the assistant speaks."""
