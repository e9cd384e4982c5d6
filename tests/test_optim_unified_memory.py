"""optim/unified_memory.py: what a machine without CUDA's bindings says, and what a GPU does."""

import gc
import sys
from unittest.mock import patch

import pytest
import torch

from optim.unified_memory import managed_zeros


def test_missing_bindings_are_named_with_the_way_out() -> None:
    hidden = {"cuda": None, "cuda.bindings": None}
    with (
        patch.dict(sys.modules, hidden),
        pytest.raises(RuntimeError, match=r"cuda-bindings.*--optim adamw"),
    ):
        managed_zeros(4, torch.device("cuda"))


@pytest.mark.gpu
def test_managed_tensor_is_zero_and_takes_part_in_kernels() -> None:
    tensor = managed_zeros(1 << 20, torch.device("cuda"))
    assert tensor.device.type == "cuda"
    assert tensor.dtype == torch.float32
    assert float(tensor.abs().sum()) == 0
    tensor.add_(torch.ones(1 << 20, device="cuda"))
    assert float(tensor.sum()) == 1 << 20


@pytest.mark.gpu
def test_managed_memory_is_unified_and_given_back() -> None:
    from cuda.bindings import runtime  # pyright: ignore[reportMissingImports]

    tensor = managed_zeros(1 << 16, torch.device("cuda"))
    pointer = tensor.data_ptr()
    _, attributes = runtime.cudaPointerGetAttributes(pointer)
    assert attributes.type == runtime.cudaMemoryType.cudaMemoryTypeManaged
    half = tensor[: 1 << 15]
    del tensor
    gc.collect()
    # a view keeps the allocation
    assert float(half.sum()) == 0
    del half
    gc.collect()
    _, attributes = runtime.cudaPointerGetAttributes(pointer)
    assert attributes.type == runtime.cudaMemoryType.cudaMemoryTypeUnregistered


@pytest.mark.gpu
def test_a_refused_allocation_is_named() -> None:
    # more than any address space: refused at once, nothing is taken
    with pytest.raises(RuntimeError, match=r"cudaMallocManaged\(\d+ bytes\) failed: cudaError"):
        managed_zeros(1 << 60, torch.device("cuda"))
