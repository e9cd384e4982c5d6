"""Files, programs and text that others wrote, read and run within limits."""
