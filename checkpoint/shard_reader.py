"""The bytes of a checkpoint's tensors, read by several threads and handed on in order.

    shards        | tensor 0 | tensor 1       | tensor 2 | ...   as they lie in the files
                       v             v             v
    pieces        | 0    | 1   | 2      | 3   | 4    |           of one tensor, PIECE_BYTES at most
                       v             v             v
    threads       | read 0 | read 3 | ...                        preadv, which holds no lock on
                  | read 1 | read 4 | ...                        Python, so they run side by side
                  | read 2 | ...
                       v
    ring          | 2 | 3 | 4 | ...                              buffers, as many pieces in flight
                       v
    sink                | copy 0 | copy 1 | copy 2 | ...         in order; returns at once
                                          | finish tensor 0 | ...

Before a thread reads a piece into a buffer, it waits until the sink has copied the piece before it.
So reading, the sink's copies and its work on whole tensors overlap, and only the ring is in memory.

safetensors' own reader maps the file: each page of it is faulted in by the thread that copies, one
at a time, a copy to a GPU goes through the driver's own buffers, and a file that is cut while it is
read ends the process with SIGBUS. It does not say where a tensor lies either, so the header is read
here too.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from foreign.json_text import parse_json

# a copy of a piece takes 0.15 ms at 55 GB/s, several times what Python needs to hand it on
PIECE_BYTES = 8 << 20
# what is read and not yet copied: 128 MiB; a GPU's driver pins 256 MiB in about 0.1 s
NUM_BUFFERS = 16
# a thread reads 5 to 10 GB/s from the page cache; more threads than cores slow each other down
NUM_THREADS = min(8, os.cpu_count() or 1)

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# and those of quantized or unneeded tensors: all of safetensors' dtypes in whole bytes
DTYPES = FLOATS | {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
# called with the number of tensors that are done and that of all
Report = Callable[[int, int], None]

# safetensors' own bound
_MOST_HEADER_BYTES = 100_000_000
# the errors that a header with unexpected JSON raises
_MALFORMED = (AttributeError, KeyError, TypeError)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint: its name, shape and dtype, and the bytes of a file that hold it."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    num_bytes: int


@dataclass(frozen=True)
class Shard:
    """A safetensors file as its header describes it, and its size and age when that was read.

    Attributes:
        tensors: in the order of their bytes.
        metadata: the header's own fields, such as `format`.
        modified_ns: the time of the file's last change, in nanoseconds since 1970.
    """

    path: Path
    tensors: tuple[StoredTensor, ...]
    metadata: Mapping[str, str]
    num_bytes: int
    modified_ns: int

    def check_unchanged(self) -> None:
        """Refuse a file that was changed since its header was read.

        In another file the tensors may lie elsewhere, and bytes of any kind would be read as
        weights. The size and the time of the last change say so without reading the header again.

        Raises:
            FileNotFoundError: the file is gone.
            ValueError: it has another size, or was written to.
        """
        status = self.path.stat()
        if (status.st_size, status.st_mtime_ns) != (self.num_bytes, self.modified_ns):
            raise ValueError(
                f"{self.path} must not change while it is in use: it did after its header was "
                "read; start again"
            )


def read_header(path: Path) -> Shard:
    """Read the header of a safetensors file.

    Raises:
        ValueError: the file is truncated, its header contradicts itself or the file's size, or a
            tensor has a dtype whose numbers are no whole bytes.
    """
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        num_file_bytes = status.st_size
        # a little-endian length, then as much JSON, then the data
        num_header_bytes = int.from_bytes(file.read(8), "little")
        first = 8 + num_header_bytes
        if num_header_bytes > _MOST_HEADER_BYTES or first > num_file_bytes:
            raise ValueError(
                f"{path} must begin with the length of its header: got {num_header_bytes} bytes "
                f"in a file of {num_file_bytes}; it is truncated or damaged, download it again"
            )
        text = file.read(num_header_bytes)
    what = f"{path} must have a header of tensors with dtype, shape and data_offsets"
    advice = "it is damaged, download it again"
    header = parse_json(text, f"{what}, which", advice)
    try:
        metadata = header.pop("__metadata__", None) or {}
        stored = [_stored_tensor(path, first, name, entry) for name, entry in header.items()]
    except _MALFORMED as error:
        raise ValueError(f"{what}: {error!r}; {advice}") from None
    for tensor in stored:
        if not first <= tensor.start <= num_file_bytes - tensor.num_bytes:
            raise ValueError(
                f"{path}: {tensor.name} must lie in the file's {num_file_bytes} bytes: got "
                f"{tensor.num_bytes} bytes from {tensor.start}; download it again"
            )
    stored.sort(key=lambda tensor: (tensor.start, tensor.num_bytes))
    return Shard(path, tuple(stored), metadata, num_file_bytes, status.st_mtime_ns)


def _stored_tensor(path: Path, first: int, name: str, entry: dict[str, Any]) -> StoredTensor:
    """Take one tensor from a header; `first` is where the file's data begins."""
    shape, offsets = tuple(entry["shape"]), tuple(entry["data_offsets"])
    if entry["dtype"] not in DTYPES:
        raise ValueError(
            f"{path}: {name} must be stored as {', '.join(DTYPES)}: got {entry['dtype']}"
        )
    dtype = DTYPES[entry["dtype"]]
    # True and False are integers to Python, and no sizes
    if not all(type(number) is int and number >= 0 for number in (*shape, *offsets)):
        raise TypeError(f"shape {shape} and data_offsets {offsets} of {name}")
    num_bytes = math.prod(shape) * dtype.itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != num_bytes:
        raise ValueError(
            f"{path}: {name} must have {num_bytes} bytes by its shape {shape} and dtype "
            f"{entry['dtype']}: got data_offsets {offsets}; download it again"
        )
    return StoredTensor(name, path, shape, dtype, first + offsets[0], num_bytes)


class Sink(Protocol):
    """Takes the bytes of one tensor after the other. All calls come from one thread."""

    def begin(self, stored: StoredTensor) -> None:
        """Make ready for a tensor's bytes."""

    def copy(self, start: int, piece: Tensor) -> Callable[[], None]:
        """Start to copy a piece, the tensor's bytes from `start` on.

        Returns:
            A function that waits until the piece has been copied. Another thread calls it.
        """
        ...

    def finish(self, stored: StoredTensor) -> None:
        """Learn that the last piece of a tensor was handed over."""


class _Piece(NamedTuple):
    """The bytes of a tensor from `start` on; a tensor without bytes has one piece of none."""

    stored: StoredTensor
    start: int
    num_bytes: int

    @property
    def is_last(self) -> bool:
        return self.start + self.num_bytes == self.stored.num_bytes


def _pieces(tensors: Iterable[StoredTensor], size: int) -> Iterator[_Piece]:
    for stored in tensors:
        for start in range(0, max(stored.num_bytes, 1), size):
            yield _Piece(stored, start, min(size, stored.num_bytes - start))


def make_ring(tensors: Iterable[StoredTensor], is_pinned: bool) -> Tensor:
    """Allocate the buffers for `stream`, no larger than the largest of `tensors`.

    Note:
        torch keeps pinned memory that is freed and gives it to the next who asks for some.
    """
    size = min(PIECE_BYTES, max((stored.num_bytes for stored in tensors), default=0))
    return torch.empty(NUM_BUFFERS, max(size, 1), dtype=torch.uint8, pin_memory=is_pinned)


def stream(
    tensors: Sequence[StoredTensor],
    ring: Tensor,  # (num_buffers, num_bytes) uint8
    sink: Sink,
    num_threads: int = NUM_THREADS,
) -> None:
    """Read tensors into the buffers of a ring, several pieces at a time, and hand them to a sink in
    order.

    Raises:
        ValueError: a file ends before a tensor's last byte.
    """
    pieces = _pieces(tensors, ring.shape[1])
    reads: deque[tuple[_Piece, Tensor, Future[None]]] = deque()
    with ExitStack() as stack:
        files = {
            path: stack.enter_context(path.open("rb", buffering=0))
            for path in dict.fromkeys(stored.file for stored in tensors)
        }
        # closed first, so that no thread reads from a closed file
        pool = stack.enter_context(ThreadPoolExecutor(num_threads))

        def read_next(buffer: Tensor, wait: Callable[[], None]) -> None:
            if (piece := next(pieces, None)) is not None:
                file = files[piece.stored.file].fileno()
                reads.append((piece, buffer, pool.submit(_read, piece, file, buffer, wait)))

        try:
            for buffer in ring:
                read_next(buffer, lambda: None)
            while reads:
                piece, buffer, read = reads.popleft()
                read.result()
                if piece.start == 0:
                    sink.begin(piece.stored)
                read_next(buffer, sink.copy(piece.start, buffer[: piece.num_bytes]))
                if piece.is_last:
                    sink.finish(piece.stored)
        finally:
            for _, _, read in reads:
                read.cancel()


def _read(piece: _Piece, file: int, buffer: Tensor, wait: Callable[[], None]) -> None:
    """Fill a buffer with a piece, as soon as it is free."""
    wait()
    read_bytes(piece.stored, piece.start, file, buffer[: piece.num_bytes])


def read_bytes(stored: StoredTensor, start: int, file: int, target: Tensor) -> None:
    """Fill `target`, uint8, with a tensor's bytes from `start` on.

    Raises:
        ValueError: the file ends before the last of them.
    """
    view = target.numpy().data
    first, done = stored.start + start, 0
    while done < len(view):
        num_read = os.preadv(file, [view[done:]], first + done)
        if num_read == 0:
            raise ValueError(
                f"{stored.file} must hold {stored.num_bytes} bytes of {stored.name} from "
                f"{stored.start}: it ends at {first + done}; it was truncated while it was read, "
                "download it again"
            )
        done += num_read


def read_tensor(stored: StoredTensor, home: Tensor | None = None) -> Tensor:
    """Read a tensor into `home`, of its shape and dtype, or into memory of its own.

    Raises:
        ValueError: its file ends before its last byte.
    """
    if home is None:
        home = torch.empty(stored.shape, dtype=stored.dtype)
    # read as bytes, so another shape would go unnoticed
    assert (home.shape, home.dtype) == (stored.shape, stored.dtype)
    with stored.file.open("rb", buffering=0) as file:
        read_bytes(stored, 0, file.fileno(), home.detach().view(-1).view(torch.uint8))
    return home
