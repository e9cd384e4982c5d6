"""The recording of a pass's launches into a CUDA graph.

Python's cyclic garbage collector may run at any allocation of an object. In the middle of a
recording it could free the graphs and the pool of an earlier pass, one that failed for instance and
whose error and frames hold each other. torch gives a pool's memory back to the driver there, which
is an error during a recording, and an error in a destructor ends the process. So the collector
waits. Nothing is collected before a recording: that takes a tenth of a second, and garbage does no
harm as long as it stays.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kernels.constants import no_new_constants


@contextmanager
def recording(
    graph: torch.cuda.CUDAGraph,
    # the stubs of torch 2.13 want a type that its own pools do not have
    pool: Any = None,
    stream: torch.cuda.Stream | None = None,
) -> Iterator[None]:
    """Record the launches of a pass, which reads tables and makes none; nothing is computed.

    Args:
        pool: id of the memory that the pass allocates from; None: its own.
        stream: on which the pass runs; None: torch's for recordings.
    """
    is_collecting = gc.isenabled()
    gc.disable()
    try:
        with no_new_constants(), torch.cuda.graph(graph, pool=pool, stream=stream):
            yield
    finally:
        if is_collecting:
            gc.enable()
