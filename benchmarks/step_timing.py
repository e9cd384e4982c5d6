"""Time training steps shape by shape: the one clock for our process and for the peers'.

A step is one micro-batch and the optimizer's step. Steps follow each other as they do in training,
in NUM_BLOCKS blocks that each begin and end with an idle device; a step's time is its block's over
the block's steps. What a process finds it prints, a JSON object a line:

    {"is_ready": true, ...}            the model is loaded
    {"provider": ..., "shape": ...}    a shape is measured, or did not fit

Imports torch alone, and nothing of this repository: it is copied beside the script of a peer.
"""

import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# the first compiles, the second may be captured
NUM_WARM_UPS = 2
NUM_BLOCKS = 3

# a micro-batch on the CPU to its mean loss on the device
Step = Callable[[Tensor], Tensor]


def parse_shape(text: str) -> tuple[int, int]:
    """Parse "4x2048" as a micro-batch of 4 samples of 2,048 tokens.

    Raises:
        ValueError: it does not read so.
    """
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"a shape must be SAMPLESxTOKENS, as in 4x2048: got {text!r}")
    return int(parts[0]), int(parts[1])


def random_ids(shape: tuple[int, int], vocab_size: int, index: int) -> Tensor:
    """Draw the micro-batch of a step, the same for every provider."""
    generator = torch.Generator().manual_seed(index)
    return torch.randint(vocab_size, shape, generator=generator)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def allocated_gib(which: str) -> float | None:
    """Read a counter of torch's allocator ("max_memory_reserved"); None without a GPU."""
    if not torch.cuda.is_available():
        return None
    return round(getattr(torch.cuda, which)() / 2**30, 3)


def print_row(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


class Stopwatch:
    """Times one process from its start.

    Attributes:
        first_step_s: from the start to the end of the first step; None before.
    """

    def __init__(self, started: float) -> None:
        """Args:
        started: when the process was started, seconds since the epoch.
        """
        self._started = started
        self.first_step_s: float | None = None

    def _block(self, step: Step, batches: Sequence[Tensor]) -> tuple[float, list[float]]:
        """Take steps one after the other: seconds a step, and the losses."""
        synchronize()
        start = time.perf_counter()
        losses = [step(ids) for ids in batches]
        synchronize()
        seconds = time.perf_counter() - start
        if self.first_step_s is None:
            self.first_step_s = round(time.time() - self._started, 2)
        return seconds / len(batches), [round(float(loss), 4) for loss in losses]

    def measure(
        self, step: Step, shape: tuple[int, int], vocab_size: int, num_steps: int
    ) -> dict[str, Any]:
        """Measure NUM_BLOCKS blocks of steps of one shape."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        resident_gib = allocated_gib("memory_allocated")
        sizes = [1] * NUM_WARM_UPS + [num_steps] * NUM_BLOCKS
        blocks, index = [], 0
        for size in sizes:
            batches = [random_ids(shape, vocab_size, i) for i in range(index, index + size)]
            blocks.append(self._block(step, batches))
            index += size
        seconds = sorted(s for s, _ in blocks[NUM_WARM_UPS:])
        median = statistics.median(seconds)
        return {
            "tokens_per_second": round(shape[0] * shape[1] / median, 1),
            "ms_p50": round(1e3 * median, 3),
            "ms_min": round(1e3 * seconds[0], 3),
            "ms_max": round(1e3 * seconds[-1], 3),
            "peak_gib": allocated_gib("max_memory_allocated"),
            "reserved_gib": allocated_gib("max_memory_reserved"),
            "resident_gib": resident_gib,
            "first_step_s": self.first_step_s,
            "losses": [loss for _, losses in blocks for loss in losses],
        }


def measure_shapes(
    facts: dict[str, Any],
    shapes: Sequence[str],
    vocab_size: int,
    num_steps: int,
    started: float,
    make_step: Callable[[tuple[int, int]], tuple[Step, dict[str, Any]]],
) -> None:
    """Print a row for every shape; one that does not fit has an error instead of figures.

    Args:
        facts: what all rows have in common; the first line says them too.
        make_step: called for each shape, after the step of the last one is gone; returns facts of
            the shape too. Raises a ValueError where a shape cannot be run.
    """
    print_row({"is_ready": True} | facts)
    watch = Stopwatch(started)
    for text in shapes:
        shape = parse_shape(text)
        try:
            step, more = make_step(shape)
            figures = more | watch.measure(step, shape, vocab_size, num_steps)
        except torch.OutOfMemoryError as error:
            figures = {"error": f"out of memory: {str(error).splitlines()[0]}"}
        except ValueError as error:
            figures = {"error": f"{error}"}
        step = None
        print_row(facts | {"shape": text} | figures)
