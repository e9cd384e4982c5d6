"""Time generation shape by shape: the one clock for our process and for the peers'.

A provider continues B prompts by a token, and by N. What both have in common is the prompts' pass;
the rest is N - 1 tokens of each. Greedy, nothing ends early; medians over NUM_TURNS turns after one
that compiles and captures. What a process finds it prints, a JSON object a line.

Imports torch alone, and nothing of this repository: it is copied beside the script of a peer.
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

NUM_TURNS = 3

# (B, T) prompts on the CPU and the number of new tokens
Generate = Callable[[Tensor, int], Any]


class Shape(NamedTuple):
    """Prompts beside each other, their tokens, and their new tokens; 1 for the prompts alone."""

    num_sequences: int
    num_tokens: int
    num_new: int

    def __str__(self) -> str:
        return f"{self.num_sequences}x{self.num_tokens}+{self.num_new}"


def parse_shape(text: str) -> Shape:
    """Parse "8x256+128" as 8 prompts of 256 tokens, and 128 new tokens of each.

    Raises:
        ValueError: it does not read so.
    """
    parts = text.replace("+", "x").split("x")
    is_ordered = text.count("x") == 1 and text.count("+") == 1 and text.index("x") < text.index("+")
    if not is_ordered or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"a shape must be PROMPTSxTOKENS+NEW, as in 8x256+128: got {text!r}")
    return Shape(*map(int, parts))


def random_prompts(shape: Shape, vocab_size: int) -> Tensor:  # (B, T)
    """Draw the prompts of a shape, the same for every provider; special tokens are left out."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.num_sequences, shape.num_tokens)
    return torch.randint(10, vocab_size, size, generator=generator)


def seconds(generate: Generate, prompts: Tensor, num_new: int) -> float:
    """Time one turn, from an idle device to an idle device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    generate(prompts, num_new)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def print_row(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


def measure(facts: dict[str, Any], generate: Generate, shape: Shape, vocab_size: int) -> None:
    """Time a shape, and print its row."""
    prompts = random_prompts(shape, vocab_size)
    times = {}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    for num_new in sorted({1, shape.num_new}):
        seconds(generate, prompts, num_new)
        turns = [seconds(generate, prompts, num_new) for _ in range(NUM_TURNS)]
        times[num_new] = statistics.median(turns)
    row = facts | {"shape": str(shape), "prompt_ms": round(times[1] * 1e3, 2)}
    if shape.num_new > 1:
        ms = (times[shape.num_new] - times[1]) / (shape.num_new - 1) * 1e3
        row |= {
            "ms_p50": round(ms, 4),
            "tokens_per_second": round(shape.num_sequences / ms * 1e3, 1),
        }
    if torch.cuda.is_available():
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
    print_row(row)
