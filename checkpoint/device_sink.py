"""The GPU's side of a load: one stream copies tensors out of the ring, another quantizes them."""

from collections.abc import Callable

import torch
from torch import Tensor

from checkpoint.shard_reader import Report, StoredTensor
from checkpoint.slots import Slot


class _Staging:
    """Device memory for a tensor that is to be quantized."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        # when the last tensor in it had been quantized
        self.vacated = torch.cuda.Event()


class DeviceSink:
    """Copies tensors to a GPU on a stream of its own; the current stream quantizes whole tensors.

    Attributes:
        homes: the memory that holds each tensor's own bytes; None for a tensor that is quantized.
        extremes: the smallest and the largest value of each tensor or its scales; both are NaN
            where one value is.
    """

    def __init__(
        self,
        wanted: list[StoredTensor],
        slots: dict[str, Slot],
        device: torch.device,
        report: Report,
    ) -> None:
        self.extremes: list[Tensor] = []
        self._slots = slots
        self._report = report
        self._num_tensors = len(wanted)
        # before the first copy, so that no copy waits for a kernel that used the memory before
        self.homes = {t.name: slots[t.name].home(t.dtype, device) for t in wanted}
        staged = [tensor.num_bytes for tensor in wanted if self.homes[tensor.name] is None]
        self._staging = [_Staging(max(staged, default=0), device) for _ in range(2)]
        self._target = torch.empty(0)
        self._target_bytes = self._target
        self._kernels = torch.cuda.current_stream(device)
        self._copies = torch.cuda.Stream(device)
        self._copies.wait_stream(self._kernels)

    def begin(self, stored: StoredTensor) -> None:
        home = self.homes[stored.name]
        if home is None:
            self._staging.reverse()
            staging = self._staging[0]
            self._copies.wait_event(staging.vacated)
            home = staging.buffer[: stored.num_bytes].view(stored.dtype).view(stored.shape)
        # copied as bytes, so a shape that is not the home's would go unnoticed
        assert (home.shape, home.dtype) == (stored.shape, stored.dtype)
        self._target, self._target_bytes = home, home.view(-1).view(torch.uint8)

    def copy(self, start: int, piece: Tensor) -> Callable[[], None]:
        with torch.cuda.stream(self._copies):
            self._target_bytes[start : start + len(piece)].copy_(piece, non_blocking=True)
        # the thread that waits sleeps: it has company, and a core may not be its own
        copied = torch.cuda.Event(blocking=True)
        copied.record(self._copies)
        return copied.synchronize

    def finish(self, stored: StoredTensor) -> None:
        self._kernels.wait_stream(self._copies)
        values = self._target
        if self.homes[stored.name] is None:
            values = self._slots[stored.name].place(values)
            self._staging[0].vacated.record(self._kernels)
        else:
            self.homes[stored.name] = self._slots[stored.name].settle(values)
        # two numbers, where isfinite() would make a temporary as large as the embeddings
        self.extremes.append(torch.stack(values.aminmax()).float())
        self._report(len(self.extremes), self._num_tensors)

    def settle(self) -> None:
        """Let the GPU's next kernels wait for the copies, whose memory they may get."""
        self._kernels.wait_stream(self._copies)
