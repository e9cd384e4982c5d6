"""Streams of a GPU that lag on purpose, so that a wait that is missing shows."""

import torch

# some 50 ms of an H200: by far more than Python takes to queue the rest of a test
LAG_CYCLES = 100_000_000


def lag(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Let a stream do nothing for a while, and return the event of its end."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LAG_CYCLES)
    return mark(stream)


def mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Return the event of a stream's having done what it was given so far."""
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event
