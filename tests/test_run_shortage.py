"""run/shortage.py: errors as torch, CUDA, cuBLAS, NCCL and Triton word them."""

import pytest
import torch

from run.shortage import is_device_failure, is_lost, is_shortage

SHORTAGES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cudaMemPrefetchAsync(20 bytes) failed: cudaErrorMemoryAllocation (2)"),
    RuntimeError("NCCL Error 1: unhandled cuda error\nCuda failure 2 'out of memory'"),
]
FAILURES = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("NCCL error: unhandled system error"),
]
OTHERS = [
    RuntimeError("shape '[3]' is invalid for input of size 4"),
    ValueError("out of memory"),
    KeyError("cuda error"),
]


@pytest.mark.parametrize("error", SHORTAGES, ids=str)
def test_memory_that_ends_is_a_shortage_whoever_says_so(error: Exception) -> None:
    assert is_shortage(error)


@pytest.mark.parametrize("error", FAILURES, ids=str)
def test_a_device_that_fails_has_no_shortage(error: Exception) -> None:
    assert is_device_failure(error)
    assert not is_shortage(error)


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors_are_neither(error: Exception) -> None:
    assert not is_shortage(error)
    assert not is_device_failure(error)


def test_a_cpu_is_never_lost() -> None:
    assert not is_lost(torch.device("cpu"))
