"""optim/unified_memory.py: two versions of CUDA's bindings, what is refused, what a GPU does."""

import gc
import sys
import weakref
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support.lagging_streams import lag, mark

from optim import unified_memory as module
from optim.state_memory import OrdinaryMemory
from optim.unified_memory import (
    Places,
    choose_residency,
    managed_zeros,
    paged_memory,
    seen_by_host,
)

CUDA = torch.device("cuda")


class Status(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1


def stand_in_runtime(version: int, status: Status = Status.cudaSuccess) -> Any:
    """What CUDA's bindings of a version have, as far as this file asks; calls are recorded."""
    calls = []

    def recorder(name: str, arity: int) -> Callable[..., tuple]:
        def call(*arguments: Any) -> tuple:
            assert len(arguments) == arity, f"{name} takes {arity} arguments: got {arguments}"
            calls.append((name, *arguments))
            return (status,)

        call.__name__ = name
        return call

    has_locations = version >= 13000
    return SimpleNamespace(
        calls=calls,
        CUDART_VERSION=version,
        cudaCpuDeviceId=-1,
        cudaMemLocation=lambda: SimpleNamespace(type=None, id=None),
        cudaMemLocationType=SimpleNamespace(
            cudaMemLocationTypeDevice="device", cudaMemLocationTypeHost="host"
        ),
        cudaMemoryAdvise=SimpleNamespace(
            cudaMemAdviseSetPreferredLocation="preferred", cudaMemAdviseSetAccessedBy="accessed"
        ),
        cudaStream_t=lambda handle: ("stream", handle),
        cudaMemAdvise=recorder("cudaMemAdvise", 4),
        cudaMemPrefetchAsync=recorder("cudaMemPrefetchAsync", 5 if has_locations else 4),
    )


@pytest.mark.parametrize("version", [12090, 13000], ids=["cuda-12", "cuda-13"])
def test_places_are_what_the_bindings_of_a_version_take(version: int) -> None:
    runtime = stand_in_runtime(version)
    places = Places(runtime, 3)
    tensor = torch.zeros(5)
    stream: Any = SimpleNamespace(cuda_stream=77)
    places.advise(tensor, "cudaMemAdviseSetPreferredLocation", places.host)
    places.prefetch(tensor, places.device, stream)
    places.prefetch(tensor, places.host, stream)
    pages = (tensor.data_ptr(), 20)
    if version >= 13000:
        device, host = SimpleNamespace(type="device", id=3), SimpleNamespace(type="host", id=0)
        flags = (0,)
    else:
        device, host, flags = 3, -1, ()
    assert runtime.calls == [
        ("cudaMemAdvise", *pages, "preferred", host),
        ("cudaMemPrefetchAsync", *pages, device, *flags, ("stream", 77)),
        ("cudaMemPrefetchAsync", *pages, host, *flags, ("stream", 77)),
    ]


def test_a_refused_prefetch_is_named() -> None:
    runtime = stand_in_runtime(13000, Status.cudaErrorInvalidValue)
    places = Places(runtime, 0)
    stream: Any = SimpleNamespace(cuda_stream=0)
    refusal = r"^cudaMemPrefetchAsync\(20 bytes\) failed: cudaErrorInvalidValue \(1\)$"
    with pytest.raises(RuntimeError, match=refusal):
        places.prefetch(torch.zeros(5), places.device, stream)


def test_missing_bindings_are_named_with_the_way_out() -> None:
    hidden = {"cuda": None, "cuda.bindings": None}
    with (
        patch.dict(sys.modules, hidden),
        pytest.raises(ValueError, match=r"cuda-bindings.*--optim adamw"),
    ):
        managed_zeros(4, CUDA)


@pytest.mark.parametrize(
    ("residency", "free_bytes", "expected"),
    [
        ("auto", 200, "device"),
        ("auto", 199, "host"),
        ("auto", 100, "host"),
        ("device", 100, "device"),
        ("host", 1000, "host"),
    ],
)
def test_auto_goes_by_the_free_memory(
    residency: str, free_bytes: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free_bytes, 10**6))
    assert choose_residency(residency, 100, CUDA) == expected


@pytest.mark.parametrize("residency", ["auto", "device", "host"])
def test_managed_memory_is_never_oversubscribed(
    residency: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (99 << 20, 10**9))
    with pytest.raises(RuntimeError, match=r"need 100 MiB on the device .* 99 MiB are free"):
        choose_residency(residency, 100 << 20, CUDA)


def test_an_unknown_residency_is_refused() -> None:
    with pytest.raises(ValueError, match="auto, device, host: got 'disk'"):
        choose_residency("disk", 1, CUDA)


def test_on_a_cpu_moments_are_where_everything_is() -> None:
    memory = paged_memory(1024, torch.device("cpu"), "auto")
    assert isinstance(memory, OrdinaryMemory)
    assert memory.describe() == "ordinary memory of cpu"


@pytest.mark.gpu
def test_a_gpu_without_concurrent_access_gets_pinned_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "has_concurrent_access", lambda _: False)
    memory = paged_memory(1024, CUDA, "auto")
    assert memory.buffer.is_pinned()
    assert "cannot prefetch unified memory" in memory.describe()


@pytest.mark.gpu
def test_managed_tensor_is_zero_and_takes_part_in_kernels() -> None:
    tensor = managed_zeros(1 << 20, CUDA)
    assert tensor.device.type == "cuda"
    assert tensor.dtype == torch.uint8
    assert tensor.data_ptr() % 256 == 0
    numbers = tensor.view(torch.float32)
    assert float(numbers.abs().sum()) == 0
    numbers.add_(torch.ones(1 << 18, device="cuda"))
    assert float(numbers.sum()) == 1 << 18


def test_the_host_sees_the_same_bytes_and_keeps_them() -> None:
    owner = torch.arange(300, dtype=torch.uint8)
    seen = seen_by_host(owner)
    assert (seen.data_ptr(), seen.device.type) == (owner.data_ptr(), "cpu")
    kept = weakref.ref(owner)
    seen[0] = 7
    assert int(owner[0]) == 7
    del owner
    gc.collect()
    assert kept() is not None
    del seen
    gc.collect()
    assert kept() is None


@pytest.mark.gpu
@pytest.mark.parametrize("is_host_resident", [False, True])
def test_what_a_step_left_is_read_from_the_host(is_host_resident: bool) -> None:
    memory = module.ManagedMemory(1 << 20, torch.device("cuda", 0), is_host_resident)
    arenas: Any = object()
    for step in range(1, 4):
        for _ in memory.pieces(arenas):
            # long enough for a read that does not wait to come first
            torch.cuda._sleep(20_000_000)
            memory.buffer.fill_(step)
        assert int(memory.settled().min()) == step
    memory.settled().fill_(9)
    for _ in memory.pieces(arenas):
        assert int(memory.buffer.min()) == 9


@pytest.mark.parametrize(("is_host_resident", "needed"), [(False, 64), (True, 65)])
def test_a_full_gpu_is_told_before_a_kernel_touches_the_moments(
    is_host_resident: bool, needed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = object.__new__(module.ManagedMemory)
    memory.is_host_resident, memory._is_prefetched = is_host_resident, False
    # of moments that wait on the host the copy there has ended
    left: Any = SimpleNamespace(query=lambda: True) if is_host_resident else None
    memory._left = left
    memory.buffer, memory._device = torch.zeros(1 << 20, dtype=torch.uint8), CUDA
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: ((needed << 20) - 1, 1 << 40))
    arenas: Any = object()
    with pytest.raises(torch.OutOfMemoryError, match=rf"must have {needed} MiB free for the opt"):
        next(iter(memory.pieces(arenas)))


@pytest.mark.gpu
def test_managed_memory_is_unified_and_given_back() -> None:
    from cuda.bindings import runtime  # pyright: ignore[reportMissingImports]

    tensor = managed_zeros(1 << 18, CUDA)
    pointer = tensor.data_ptr()
    _, attributes = runtime.cudaPointerGetAttributes(pointer)
    assert attributes.type == runtime.cudaMemoryType.cudaMemoryTypeManaged
    half = tensor[: 1 << 17]
    del tensor
    gc.collect()
    # a view keeps the allocation
    assert int(half.sum()) == 0
    del half
    gc.collect()
    _, attributes = runtime.cudaPointerGetAttributes(pointer)
    assert attributes.type == runtime.cudaMemoryType.cudaMemoryTypeUnregistered


def last_prefetch_location(tensor: torch.Tensor) -> int:
    """Ask the driver where a tensor was last prefetched to: a device, or -1 for the host."""
    from cuda.bindings import runtime  # pyright: ignore[reportMissingImports]

    attribute = runtime.cudaMemRangeAttribute.cudaMemRangeAttributeLastPrefetchLocation
    status, value = runtime.cudaMemRangeGetAttribute(4, attribute, tensor.data_ptr(), tensor.nbytes)
    assert int(status) == 0
    return int(value)


@pytest.mark.gpu
def test_host_resident_memory_is_on_the_device_for_a_step_only() -> None:
    memory = module.ManagedMemory(1 << 20, torch.device("cuda", 0), is_host_resident=True)
    memory.prefetch()
    torch.cuda.synchronize()
    assert last_prefetch_location(memory.buffer) == 0
    arenas: Any = object()
    assert list(memory.pieces(arenas)) == [arenas]
    torch.cuda.synchronize()
    assert last_prefetch_location(memory.buffer) == -1
    assert (memory.bytes_to_device, memory.bytes_to_host) == (1 << 20, 1 << 20)
    # a step that nobody prefetched for does it itself
    list(memory.pieces(arenas))
    assert (memory.bytes_to_device, memory.bytes_to_host) == (2 << 20, 2 << 20)


@pytest.fixture
def memory(
    device_with_streams: torch.device, monkeypatch: pytest.MonkeyPatch
) -> module.ManagedMemory:
    """A MiB of unified memory; without a GPU nothing moves, and streams wait all the same."""
    if device_with_streams.type == "cpu":
        runtime = stand_in_runtime(13000)
        monkeypatch.setattr(module, "cuda_runtime", lambda: runtime)
        monkeypatch.setattr(module, "managed_zeros", lambda size, _: torch.zeros(size))
    memory = module.ManagedMemory(1 << 20, device_with_streams, is_host_resident=False)
    torch.cuda.synchronize()
    return memory


@pytest.mark.parametrize("way", ["prefetch", "evict"])
def test_pages_move_after_what_was_queued_before(memory: module.ManagedMemory, way: str) -> None:
    computed = lag(torch.cuda.current_stream())
    {"prefetch": memory.prefetch, "evict": memory.evict}[way]()
    moved = mark(memory._stream)
    torch.cuda.synchronize()
    assert computed.elapsed_time(moved) >= 0


def test_a_step_begins_when_the_moments_are_there(memory: module.ManagedMemory) -> None:
    memory.prefetch()
    torch.cuda.synchronize()
    # stands for pages that are long on their way
    arrived = lag(memory._stream)
    arenas: Any = object()
    pieces = memory.pieces(arenas)
    next(pieces)
    begun = mark(torch.cuda.current_stream())
    torch.cuda.synchronize()
    assert arrived.elapsed_time(begun) >= 0


@pytest.mark.gpu
def test_a_refused_allocation_is_named() -> None:
    # more than any address space: refused at once, nothing is taken
    with pytest.raises(RuntimeError, match=r"cudaMallocManaged\(\d+ bytes\) failed: cudaError"):
        managed_zeros(1 << 60, CUDA)
