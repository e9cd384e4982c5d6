"""checkpoint/shard_reader.py: every byte arrives once and in order, headers that lie are
refused."""

import json
import os
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.equality import assert_equal
from torch import Tensor

from checkpoint import shard_reader as module
from checkpoint.shard_reader import StoredTensor, make_ring, read_header, read_tensor, stream

# bytes of tensors: none, one, a prime, a round number and its neighbours, many
SIZES = (13, 0, 64, 1, 63, 65, 0, 997, 128)


class LateSink:
    """Copies a piece only when somebody waits for it, as late as a device may."""

    def __init__(self) -> None:
        self.arrived: dict[str, Tensor] = {}
        self.finished: list[str] = []
        self.waits: list[Callable[[], None]] = []
        self.thread = threading.get_ident()

    def begin(self, stored: StoredTensor) -> None:
        assert len(self.finished) == len(self.arrived)
        assert threading.get_ident() == self.thread
        self.target = torch.full((stored.num_bytes,), 0xA5, dtype=torch.uint8)
        self.arrived[stored.name] = self.target
        self.next = 0

    def copy(self, start: int, piece: Tensor) -> Callable[[], None]:
        assert start == self.next
        self.next += len(piece)
        target = self.target[start : self.next]
        lock, is_done = threading.Lock(), threading.Event()

        def wait() -> None:
            with lock:
                if not is_done.is_set():
                    target.copy_(piece)
                    is_done.set()

        self.waits.append(wait)
        return wait

    def finish(self, stored: StoredTensor) -> None:
        assert self.next == stored.num_bytes
        self.finished.append(stored.name)


def write_bytes(path: Path, sizes: Sequence[int], gap: int = 3) -> list[StoredTensor]:
    """Write random bytes, and describe parts of them with gaps between as tensors."""
    content = torch.randint(256, (sum(sizes) + gap * (len(sizes) + 1),), dtype=torch.uint8)
    path.write_bytes(content.numpy().tobytes())
    tensors, start = [], gap
    for index, size in enumerate(sizes):
        name = f"{path.name}.{index}"
        tensors.append(StoredTensor(name, path, (size,), torch.float32, start, size))
        start += size + gap
    return tensors


def ring_of(num_buffers: int, size: int) -> Tensor:
    return torch.full((num_buffers, size), 0x5A, dtype=torch.uint8)


def bytes_of(stored: StoredTensor) -> bytes:
    return stored.file.read_bytes()[stored.start : stored.start + stored.num_bytes]


def assert_arrived(sink: LateSink, tensors: Sequence[StoredTensor]) -> None:
    for wait in sink.waits:
        wait()
    assert sink.finished == [stored.name for stored in tensors]
    for stored in tensors:
        assert sink.arrived[stored.name].numpy().tobytes() == bytes_of(stored), stored.name


@pytest.mark.parametrize("num_threads", [1, 2, 8], ids="{}threads".format)
@pytest.mark.parametrize("num_buffers", [1, 3, 64], ids="{}buffers".format)
@pytest.mark.parametrize("size", [1, 7, 64, 4096], ids="{}bytes".format)
def test_every_byte_arrives_in_order(
    tmp_path: Path, size: int, num_buffers: int, num_threads: int
) -> None:
    tensors = write_bytes(tmp_path / "a", SIZES) + write_bytes(tmp_path / "b", SIZES[::-1])
    sink = LateSink()
    stream(tensors, ring_of(num_buffers, size), sink, num_threads)
    assert_arrived(sink, tensors)


def test_tensors_need_not_be_in_the_files_order(tmp_path: Path) -> None:
    tensors = write_bytes(tmp_path / "a", SIZES)[::-1]
    sink = LateSink()
    stream(tensors, ring_of(3, 16), sink)
    assert_arrived(sink, tensors)


def test_no_tensor_is_no_work() -> None:
    sink = LateSink()
    stream([], make_ring([], is_pinned=False), sink)
    assert_arrived(sink, [])


def test_pieces_are_read_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # opens when four threads are reading
    barrier = threading.Barrier(4, timeout=60)
    preadv = os.preadv

    def read(*arguments: Any) -> int:
        barrier.wait()
        return preadv(*arguments)

    monkeypatch.setattr(module.os, "preadv", read)
    tensors = write_bytes(tmp_path / "a", [40, 40])
    sink = LateSink()
    stream(tensors, ring_of(4, 10), sink, num_threads=4)
    assert_arrived(sink, tensors)


def test_a_read_that_stops_short_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv
    monkeypatch.setattr(
        module.os, "preadv", lambda file, views, start: preadv(file, [views[0][:5]], start)
    )
    tensors = write_bytes(tmp_path / "a", SIZES)
    sink = LateSink()
    stream(tensors, ring_of(3, 16), sink)
    assert_arrived(sink, tensors)


@pytest.mark.parametrize("num_left", [0, 12, 100, 499])
def test_a_file_that_has_become_shorter_is_named(tmp_path: Path, num_left: int) -> None:
    tensors = write_bytes(tmp_path / "a", SIZES)
    shorter = write_bytes(tmp_path / "b", [500], gap=0)
    os.truncate(tmp_path / "b", num_left)
    sink = LateSink()
    message = f"{tmp_path / 'b'} must hold 500 bytes of b.0 from 0: it ends at {num_left}; "
    with pytest.raises(ValueError, match=re.escape(message)):
        stream([*tensors, *shorter], ring_of(3, 64), sink)
    assert "b.0" not in sink.finished


def test_an_error_of_the_sink_ends_every_thread(tmp_path: Path) -> None:
    class FailingSink(LateSink):
        def finish(self, stored: StoredTensor) -> None:
            super().finish(stored)
            if len(self.finished) == 3:
                raise MemoryError("full")

    sink = FailingSink()
    num_threads = threading.active_count()
    with pytest.raises(MemoryError, match="full"):
        stream(write_bytes(tmp_path / "a", SIZES), ring_of(2, 16), sink)
    assert threading.active_count() == num_threads
    assert len(sink.finished) == 3


def test_the_ring_is_no_larger_than_the_largest_tensor(tmp_path: Path) -> None:
    tensors = write_bytes(tmp_path / "a", SIZES)
    assert make_ring(tensors, is_pinned=False).shape == (module.NUM_BUFFERS, max(SIZES))
    huge = StoredTensor("huge", tmp_path / "a", (), torch.float32, 0, 1 << 40)
    ring = make_ring([*tensors, huge], is_pinned=False)
    assert ring.shape == (module.NUM_BUFFERS, module.PIECE_BYTES)


def test_a_header_tells_where_every_tensor_lies(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {
        "scalar": torch.randn(()),
        "empty": torch.empty(0, 3),
        "vector": torch.randn(7).half(),
        "matrix": torch.randn(5, 9).bfloat16(),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    stored = read_header(path).tensors
    with safe_open(path, framework="pt") as file:
        assert [tensor.name for tensor in stored] == list(file.offset_keys())
    for tensor in stored:
        expected = tensors[tensor.name]
        assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype)
        content = expected.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert bytes_of(tensor) == content
        assert_equal(read_tensor(tensor), expected)
        home = torch.zeros_like(expected)
        read_tensor(tensor, home)
        assert_equal(home, expected)


def write_header(path: Path, header: bytes, data: bytes = bytes(64)) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | changes


def test_tensors_are_listed_by_offset_not_by_name(tmp_path: Path) -> None:
    header = {
        "a": entry(data_offsets=[40, 64]),
        "__metadata__": {"format": "pt"},
        "b": entry(shape=[4], data_offsets=[24, 40]),
        "c": entry(),
    }
    path = write_header(tmp_path / "x", json.dumps(header).encode())
    stored = read_header(path).tensors
    assert [tensor.name for tensor in stored] == ["c", "b", "a"]
    first = path.stat().st_size - 64
    assert [tensor.start - first for tensor in stored] == [0, 24, 40]


HEADERS: dict[str, tuple[Any, str]] = {
    "not-json": ("{", "must have a header of tensors"),
    "a-list": ([], "must have a header of tensors"),
    "a-number-for-a-tensor": ({"a": 3}, "must have a header of tensors"),
    "no-dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, "KeyError('dtype')"),
    "an-unknown-dtype": (
        {"a": entry(dtype="F4")},
        "a must be stored as F32, F16, BF16, BOOL, U8, I8, U16, I16, U32, I32, U64, I64, F64, "
        "F8_E4M3, F8_E5M2, F8_E8M0: got F4",
    ),
    "a-dtype-of-lists": ({"a": entry(dtype=[])}, "must have a header of tensors"),
    "a-negative-shape": ({"a": entry(shape=[-2, -3])}, "shape (-2, -3)"),
    "a-shape-of-fractions": ({"a": entry(shape=[2.0, 3])}, "shape (2.0, 3)"),
    "no-shape": ({"a": entry(shape=None)}, "must have a header of tensors"),
    "a-shape-of-truths": ({"a": entry(shape=[True, 6])}, "shape (True, 6)"),
    "another-shape": (
        {"a": entry(shape=[2, 4])},
        "a must have 32 bytes by its shape (2, 4) and dtype F32: got data_offsets (0, 24)",
    ),
    "another-dtype": ({"a": entry(dtype="BF16")}, "a must have 12 bytes"),
    "offsets-reversed": ({"a": entry(data_offsets=[24, 0])}, "got data_offsets (24, 0)"),
    "one-offset": ({"a": entry(data_offsets=[24])}, "got data_offsets (24,)"),
    "offsets-negative": ({"a": entry(data_offsets=[-24, 0])}, "data_offsets (-24, 0)"),
    "offsets-beyond-the-file": (
        {"a": entry(data_offsets=[41, 65])},
        "a must lie in the file's",
    ),
    "a-shape-beyond-the-file": (
        {"a": entry(shape=[1 << 62], data_offsets=[0, 1 << 64])},
        "a must lie in the file's",
    ),
    "nested-beyond-reason": ("[" * 100_000, "must have a header of tensors"),
    "not-text": (b"\xff\xfe{}", "must have a header of tensors"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies_is_refused(tmp_path: Path, case: str) -> None:
    header, message = HEADERS[case]
    if not isinstance(header, bytes):
        header = (header if isinstance(header, str) else json.dumps(header)).encode()
    path = write_header(tmp_path / "x", header)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        read_header(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x01", b"\x00" * 7, b"\x09" + b"\x00" * 7 + b"{}", b"\xff" * 8 + b"{}"],
    ids=["empty", "one-byte", "seven-bytes", "beyond-the-file", "beyond-everything"],
)
def test_a_length_that_lies_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} must begin with the length"):
        read_header(path)


def test_a_huge_header_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes((100_000_001).to_bytes(8, "little"))
    # takes no room on the disk
    os.truncate(path, 200_000_000)
    with pytest.raises(ValueError, match="got 100000001 bytes in a file of 200000000"):
        read_header(path)
