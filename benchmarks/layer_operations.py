"""What the benchmarks of a layer's elementwise operations share: shapes, providers, their table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as compiler_config

from benchmarks import measure
from benchmarks.command import Candidate, Machine, Work, limit_row, measured_rows
from benchmarks.measure import Call, Operation
from benchmarks.tables import Row

# tokens of a micro-step: 1 x 2048 and 4 x 2048
NUM_ROWS = (2048, 8192)
# of Llama-3-8B
HIDDEN_SIZE = 4096
INTERMEDIATE_SIZE = 14336
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128


@dataclass(frozen=True)
class Provided:
    """An operation's calls over input sets: our kernels alone, and the reference through autograd.

    The reference's backward calls run over graphs that are kept, made once by `torch` and once by
    `torch.compile`.
    """

    ours: Sequence[Call]
    torch: Sequence[Call]
    compiled: Sequence[Call]


def forward_calls(function: Callable[..., Any], sets: Sequence[Sequence[Any]]) -> list[Call]:
    """Bind a function to each set of arguments."""
    return [partial(function, *arguments) for arguments in sets]


def backward_calls(
    function: Callable[..., Any],
    sets: Sequence[Sequence[Any]],  # of which the leaves require gradients
    grads: Sequence[Sequence[Tensor]],  # of the function's results, for each set
) -> list[Call]:
    """Run a function over each set, and bind the backward pass through it."""
    calls = []
    # autograd runs backward on the stream of the forward pass, and a graph is captured on this one
    torch.cuda.synchronize()
    stream = torch.cuda.stream(measure.side_stream())
    # a compiled graph that may reuse what it saved runs backward only once
    with stream, compiler_config.patch(donated_buffer=False):
        for arguments, grad in zip(sets, grads, strict=True):
            outputs = function(*arguments)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            leaves = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
            calls.append(
                partial(
                    torch.autograd.grad,
                    outputs[: len(grad)],
                    leaves,
                    grad,
                    retain_graph=True,
                )
            )
    return calls


def both_calls(first: Sequence[Call], second: Sequence[Call]) -> list[Call]:
    """Make one call of two."""

    def both(one: Call, other: Call) -> tuple[Any, Any]:
        return one(), other()

    return [partial(both, one, other) for one, other in zip(first, second, strict=True)]


def rows_of(work: Work, provided: Provided, machine: Machine) -> list[Row]:
    """Measure every provider of one operation, in turns."""
    candidates = [
        Candidate(work, "ours", Operation(provided.ours)),
        Candidate(work, "torch", Operation(provided.torch)),
        Candidate(work, "torch.compile", Operation(provided.compiled)),
    ]
    return [limit_row(work, machine), *measured_rows(candidates, machine)]
