"""The facts about a GPU on which kernels' choices depend.

On the meta device, whose tensors have sizes and no values, the facts are those of a GPU that the
meta device stands for: a launcher allocates there as much as it would allocate on that GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch


class Properties(NamedTuple):
    """The facts of a GPU on which a choice between kernels depends."""

    capability: tuple[int, int]
    num_multiprocessors: int
    # shared memory that one program may have
    shared_bytes: int


# CUDA programming guide, "Technical Specifications per Compute Capability"
H200 = Properties((9, 0), 132, 232_448)

# compute capability from which on Triton's products use the tensor cores
TENSOR_CORES_FROM = (8, 0)

_stood_for = H200


@cache
def _properties_of_gpu(device: torch.device) -> Properties:
    found = torch.cuda.get_device_properties(device)
    return Properties(
        (found.major, found.minor),
        found.multi_processor_count,
        found.shared_memory_per_block_optin,
    )


def properties(device: torch.device) -> Properties:
    """Find the facts of a GPU, or of the GPU that the meta device stands for."""
    return _stood_for if device.type == "meta" else _properties_of_gpu(device)


@contextmanager
def meta_stands_for(gpu: Properties) -> Iterator[None]:
    """Let the meta device answer as a GPU would."""
    global _stood_for
    before, _stood_for = _stood_for, gpu
    try:
        yield
    finally:
        _stood_for = before
