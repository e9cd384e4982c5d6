"""CUDA unified memory: one buffer whose pages lie on the device or on the host.

torch has no allocator for it, so this file calls the CUDA runtime through `cuda.bindings`, which
torch's CUDA wheels bring along from 2.10 on. It is the only file that does.

Where the pages are. By itself the driver moves a page when it is touched: a few KB at a time, each
after a fault, an order of magnitude below the bandwidth of the link. So pages are moved before a
step touches them:

    device   The buffer is advised to live on the device and prefetched there before each step. As a
             rule it is there already, and that costs nothing. Where other programs have driven
             pages out to the host, they come back in one transfer, beside the backward pass.
    host     The buffer is advised to live on the host. Before each step it is prefetched to the
             device, beside the backward pass, and after it back, beside the next forward pass: the
             device holds it for a short while only, and pays two transfers a step for that.
    auto     host where less than twice the buffer is free on the device at first, device otherwise.

Transfers run on a stream of their own: the device waits for them before a step, the host never.

A full device. Where ordinary memory is asked for and none is left, the driver moves pages of
unified memory to the host. A kernel that touches them while the device is full ends in an illegal
access, and everything on the device is lost. So a step is refused before its kernels where less
than RESERVE_BYTES are free, and checkpoints are read and written from the host's side.
"""

import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.adamw_arenas import Arenas
from optim.staged_memory import StagedMemory
from optim.state_memory import OrdinaryMemory, StateMemory

RESIDENCIES = ("auto", "device", "host")
# free memory, in buffers, below which `auto` keeps the buffer on the host
AUTO_FREE_BUFFERS = 2
# what must be free on the device for pages and their tables to come back: on an H200 kernels
# failed with 16 MiB free, and ran with 64
RESERVE_BYTES = 64 << 20
# from this version on, the runtime takes a place as a struct where it took a device's number
LOCATION_VERSION = 13000
MIB = 1 << 20


def _call(function: Callable[..., tuple], *arguments: Any, what: str) -> Any:
    """Call a CUDA runtime function and return its value; a status other than success is raised."""
    status, *values = function(*arguments)
    if int(status) != 0:
        raise RuntimeError(f"{function.__name__}({what}) failed: {status.name} ({int(status)})")
    return values[0] if values else None


def cuda_runtime() -> Any:
    """Import the CUDA runtime's bindings.

    Raises:
        ValueError: they are not installed.
    """
    try:
        # here, not at the top: torch's CPU wheels come without it, and a CPU never calls this
        from cuda.bindings import runtime  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            "paged optimizer state needs the package cuda-bindings, which torch's CUDA wheels "
            "bring: it is missing; install it or choose --optim adamw"
        ) from error
    return runtime


class _ManagedBuffer:
    """Owns one cudaMallocManaged allocation; torch keeps it alive as long as a tensor uses it."""

    def __init__(self, runtime: Any, num_bytes: int) -> None:
        pointer = _call(
            runtime.cudaMallocManaged,
            num_bytes,
            runtime.cudaMemAttachGlobal,
            what=f"{num_bytes} bytes",
        )
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (pointer, False),
        }
        # at exit the driver frees everything, and the runtime may be gone before us
        release = weakref.finalize(self, _call, runtime.cudaFree, pointer, what="managed memory")
        release.atexit = False


class Places:
    """The device and the host as the runtime's prefetch and advice want to hear of them.

    CUDA 13 takes a cudaMemLocation and flags; before, a device's number, with one for the host.
    """

    def __init__(self, runtime: Any, device_index: int) -> None:
        self._runtime = runtime
        self._takes_locations = runtime.CUDART_VERSION >= LOCATION_VERSION
        kinds = runtime.cudaMemLocationType
        if self._takes_locations:
            self.device = self._location(kinds.cudaMemLocationTypeDevice, device_index)
            self.host = self._location(kinds.cudaMemLocationTypeHost, 0)
        else:
            self.device, self.host = device_index, int(runtime.cudaCpuDeviceId)

    def _location(self, kind: Any, index: int) -> Any:
        location = self._runtime.cudaMemLocation()
        location.type, location.id = kind, index
        return location

    def advise(self, tensor: Tensor, name: str, place: Any) -> None:
        """Give the driver an advice ("cudaMemAdviseSetPreferredLocation") on a tensor's pages."""
        runtime = self._runtime
        advice = getattr(runtime.cudaMemoryAdvise, name)
        arguments = (tensor.data_ptr(), tensor.nbytes, advice, place)
        _call(runtime.cudaMemAdvise, *arguments, what=f"{tensor.nbytes} bytes, {name}")

    def prefetch(self, tensor: Tensor, place: Any, stream: torch.cuda.Stream) -> None:
        """Queue the way of a tensor's pages to a place."""
        runtime = self._runtime
        flags = (0,) if self._takes_locations else ()
        arguments = (tensor.data_ptr(), tensor.nbytes, place, *flags)
        handle = runtime.cudaStream_t(stream.cuda_stream)
        _call(runtime.cudaMemPrefetchAsync, *arguments, handle, what=f"{tensor.nbytes} bytes")


def managed_zeros(num_bytes: int, device: torch.device) -> Tensor:  # (num_bytes,) uint8
    """Allocate zeroed bytes in CUDA unified memory, first resident on `device`.

    Raises:
        ValueError: cuda.bindings is not installed.
        RuntimeError: the device refused the allocation.
    """
    runtime = cuda_runtime()
    with torch.cuda.device(device):
        tensor = torch.as_tensor(_ManagedBuffer(runtime, num_bytes), device=device)
        return tensor.zero_()


def seen_by_host(managed: Tensor) -> Tensor:  # (num_bytes,) uint8, and so is the result
    """View managed bytes as a tensor of the CPU, which keeps them alive."""
    place = {
        "version": 3,
        "shape": tuple(managed.shape),
        "typestr": "|u1",
        "data": (managed.data_ptr(), False),
    }
    return torch.from_numpy(np.asarray(SimpleNamespace(__array_interface__=place, owner=managed)))


def has_concurrent_access(device: torch.device) -> bool:
    """Tell whether host and device may use managed memory at the same time, and prefetch it.

    Raises:
        ValueError: cuda.bindings is not installed.
        RuntimeError: the device refused to answer.
    """
    runtime = cuda_runtime()
    attribute = runtime.cudaDeviceAttr.cudaDevAttrConcurrentManagedAccess
    index = _index_of(device)
    return bool(
        _call(runtime.cudaDeviceGetAttribute, attribute, index, what="concurrentManagedAccess")
    )


def _index_of(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def choose_residency(residency: str, num_bytes: int, device: torch.device) -> str:
    """Decide where the buffer lives; `auto` depends on the memory that is free on the device now.

    Raises:
        ValueError: an unknown residency.
        torch.OutOfMemoryError: the device has no room for the buffer even while a step runs.
            Managed memory could be had nevertheless, and would thrash.
    """
    if residency not in RESIDENCIES:
        raise ValueError(
            f"--optimizer-residency must be one of {', '.join(RESIDENCIES)}: got {residency!r}"
        )
    free_bytes = torch.cuda.mem_get_info(device)[0]
    if free_bytes < num_bytes:
        raise torch.OutOfMemoryError(
            f"the optimizer's moments need {num_bytes / MIB:.0f} MiB on the device while a step "
            f"runs: {free_bytes / MIB:.0f} MiB are free; choose --optim paged_adamw_8bit or a "
            "smaller --lora-r"
        )
    if residency != "auto":
        return residency
    return "host" if free_bytes < AUTO_FREE_BUFFERS * num_bytes else "device"


class ManagedMemory:
    """A buffer in CUDA unified memory, on the device for every step.

    Attributes:
        is_host_resident: between steps it is on the host.
        bytes_to_device: prefetched so far, pages that were there already included.
        bytes_to_host: prefetched so far.
    """

    def __init__(self, num_bytes: int, device: torch.device, is_host_resident: bool) -> None:
        self.is_host_resident = is_host_resident
        self.bytes_to_device = self.bytes_to_host = 0
        self.buffer = managed_zeros(num_bytes, device)
        self._on_host = seen_by_host(self.buffer)
        self._device = self.buffer.device
        self._places = Places(cuda_runtime(), _index_of(self._device))
        self._stream = torch.cuda.Stream(self._device)
        self._is_prefetched = False
        # of the last way to the host
        self._left: torch.cuda.Event | None = None
        with torch.cuda.device(self._device):
            home = self._places.host if is_host_resident else self._places.device
            self._places.advise(self.buffer, "cudaMemAdviseSetPreferredLocation", home)
            # wherever its pages are, the device maps them: a step that meets some on the host works
            self._places.advise(self.buffer, "cudaMemAdviseSetAccessedBy", self._places.device)

    def prefetch(self) -> None:
        """Queue the way to the device, not before what the current stream has queued so far.

        Raises:
            torch.OutOfMemoryError: too little is free on the device; nothing was queued.
        """
        if self._is_prefetched:
            return
        # the copy may still be on its way to the host
        is_away = self._left is not None and self._left.query()
        needed = RESERVE_BYTES + self.buffer.nbytes * is_away
        free = torch.cuda.mem_get_info(self._device)[0]
        if free < needed:
            raise torch.OutOfMemoryError(
                f"the GPU must have {needed / MIB:,.0f} MiB free for the optimizer's moments: "
                f"{free / MIB:,.0f} MiB are"
            )
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            self._places.prefetch(self.buffer, self._places.device, self._stream)
        self.bytes_to_device += self.buffer.nbytes
        self._is_prefetched, self._left = True, None

    def pieces(self, arenas: Arenas) -> Iterator[Arenas]:
        self.prefetch()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        yield arenas
        self._is_prefetched = False
        if self.is_host_resident:
            self.evict()

    def evict(self) -> None:
        """Queue the way to the host, after what the current stream has queued so far."""
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            self._places.prefetch(self.buffer, self._places.host, self._stream)
            self._left = torch.cuda.Event()
            self._left.record(self._stream)
        self.bytes_to_host += self.buffer.nbytes

    def settled(self) -> Tensor:
        # both sides see the same bytes; what a step does to them is queued on its stream
        torch.cuda.synchronize(self._device)
        return self._on_host

    def describe(self) -> str:
        home = "on the host between steps" if self.is_host_resident else "resident on the device"
        moved = ", ".join(
            f"{count / MIB:,.1f} MiB prefetched to the {place}"
            for count, place in ((self.bytes_to_device, "device"), (self.bytes_to_host, "host"))
            if count
        )
        return f"CUDA unified memory, {home}" + (f", {moved}" if moved else "")


def paged_memory(num_bytes: int, device: torch.device, residency: str) -> StateMemory:
    """Allocate moments that may leave the device: unified memory where it can be prefetched.

    On a CPU, and on the meta device, they are where everything is. A GPU without concurrent managed
    access (under Windows and WSL, or before Pascal) gets pinned host memory and copies, which is
    said in `describe`.

    Raises:
        ValueError: an unknown residency, or no cuda.bindings.
        torch.OutOfMemoryError: no room.
        RuntimeError: the device refused the allocation.
    """
    if device.type != "cuda":
        return OrdinaryMemory(num_bytes, device)
    if not has_concurrent_access(device):
        return StagedMemory(num_bytes, device)
    is_host_resident = choose_residency(residency, num_bytes, device) == "host"
    return ManagedMemory(num_bytes, device, is_host_resident)
