"""From a checkpoint folder to a ready model, one tensor at a time.

    on a GPU, three things at once:
    threads    | read 2         | read 3 ...       shard -> pinned ring (checkpoint/shard_reader.py)
    copies     | copy 1         | copy 2 ...       ring -> staging, or home if it is kept as it is
    kernels    | quantize 0     | quantize 1 ...   staging -> its group's buffer

    on the CPU: shard -> home, or memory of its own -> quantized -> its group's buffer

    what is NF4 in the file already is kept as it is: its codes and scales go home

So the peak is the packed model plus one tensor on the CPU and two on a GPU, where a tensor is the
largest that is quantized here, in the checkpoint's dtype; and the quantizer's bounded temporaries.
Embeddings, norms and what else is kept as it is go to their home directly. A GPU's load also holds
128 MiB of pinned host memory.

NaN and infinity are found as each tensor arrives; a GPU takes note of them and is asked once, at
the end.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from checkpoint.description import META, Description, Slot, describe, kept_dtype
from checkpoint.shard_reader import StoredTensor, make_ring, read_tensor, stream
from checkpoint.stored_nf4 import describe_quantization
from llama.model import Llama
from nf4.serialized import restore_state
from nf4.weight import Quantization, non_finite_weights

CPU = torch.device("cpu")

Report = Callable[[int, int], None]


def load_sizes(
    folder: Path, compute_dtype: torch.dtype, quantization: Quantization | None
) -> Llama:
    """Make on the meta device what `load_model` makes on another: the same tensors, without values.

    Raises:
        As `load_model`, but for what only a tensor's values can tell.
    """
    found = _allocated(folder, META, compute_dtype, quantization)
    for tensor in found.needed():
        dtype = kept_dtype(found.model, tensor.name, tensor.dtype)
        found.slots[tensor.name].home(dtype, META)
    return found.model.eval()


def load_model(
    folder: Path,
    device: torch.device,
    compute_dtype: torch.dtype,
    quantization: Quantization | None,
    report: Report = lambda done, total: None,
) -> Llama:
    """Load a checkpoint's model, frozen, with the head in the compute dtype.

    Linear groups are quantized while they load. A checkpoint that is in NF4 already is loaded as it
    is stored.

    Args:
        quantization: of the linear groups, None to keep them as stored. Of a checkpoint in NF4 the
            stored one (`settle_quantization` finds it).
        report: called as `report(done, total)` after each tensor.

    Raises:
        FileNotFoundError: config.json, an index or a shard is missing.
        ValueError: the files contradict each other or config.json, are in another format or another
            quantization than asked for, or a tensor holds a NaN or an infinity.
    """
    found = _allocated(folder, device, compute_dtype, quantization)
    model, wanted = found.model, found.needed()
    if device.type == "cpu":
        _load_on_cpu(wanted, found.slots, report)
    else:
        _load_on_gpu(wanted, found.slots, device, report)
    found.check_tied_head()
    return model.eval()


def _allocated(
    folder: Path,
    device: torch.device,
    compute_dtype: torch.dtype,
    quantization: Quantization | None,
) -> Description:
    """Describe a checkpoint, and allocate the model's groups on a device."""
    found = describe(folder, compute_dtype)
    model, stored = found.model, found.stored
    if found.nf4.quantization not in (None, quantization):
        raise ValueError(
            f"{folder} must be loaded as it is stored: it is in NF4 with "
            f"{describe_quantization(found.nf4.quantization)}, asked for is "
            f"{describe_quantization(quantization)}"
        )
    for prefix, group in model.groups():
        form = found.quantization(prefix, group, quantization)
        weights = [f"{prefix}{name}.weight" for name in group.names]
        biases = [f"{prefix}{name}.bias" for name in group.names] if group.has_bias else []
        # quantized members keep no dtype, so theirs may differ
        weight_dtype = None if form else _shared_dtype(folder, stored, weights)
        bias_dtype = _shared_dtype(folder, stored, biases) if biases else None
        group.allocate(device, weight_dtype, bias_dtype, form)
        for name, weight in zip(group.names, weights, strict=True):
            if weight in found.nf4.states:
                restore_state(group.member(name), found.nf4.states[weight])
    model.frequencies = model.frequencies.to(device)
    return found


def _shared_dtype(
    folder: Path, stored: dict[str, StoredTensor], names: Iterable[str]
) -> torch.dtype:
    """The one dtype of tensors that share a buffer."""
    names = list(names)
    dtypes = {stored[name].dtype for name in names}
    if len(dtypes) > 1:
        raise ValueError(
            f"{folder}: {', '.join(names)} must share a dtype: "
            f"got {', '.join(sorted(str(dtype) for dtype in dtypes))}"
        )
    return dtypes.pop()


def _load_on_cpu(wanted: list[StoredTensor], slots: dict[str, Slot], report: Report) -> None:
    """Read one tensor after the other to its home, or quantize it."""
    for done, stored in enumerate(wanted, start=1):
        slot = slots[stored.name]
        home = slot.home(stored.dtype, CPU)
        if home is None:
            matrix = read_tensor(stored)
            if not bool(slot.quantize(matrix).isfinite().all()):
                raise non_finite_weights(matrix, stored.name)
            # gone before the next one is read
            del matrix
        else:
            read_tensor(stored, home)
            check_finite(stored.name, home)
            slot.settle(home)
        report(done, len(wanted))


def _load_on_gpu(
    wanted: list[StoredTensor], slots: dict[str, Slot], device: torch.device, report: Report
) -> None:
    """Load tensors through pinned memory and quantize them there.

    Note:
        Synchronizes with the device once, at the end, to look for values that are not finite.
    """
    sink = _DeviceSink(wanted, slots, device, report)
    try:
        stream(wanted, make_ring(wanted, is_pinned=True), sink)
    finally:
        sink.settle()
    is_finite = torch.stack(sink.extremes).isfinite().all(dim=1).tolist()
    for tensor, is_good in zip(wanted, is_finite, strict=True):
        if is_good:
            continue
        if sink.homes[tensor.name] is not None:
            raise _non_finite_values(tensor.name)
        raise non_finite_weights(read_tensor(tensor), tensor.name)


class _Staging:
    """Device memory for a tensor that is to be quantized."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        # when the last tensor in it had been quantized
        self.vacated = torch.cuda.Event()


class _DeviceSink:
    """Copies tensors to a GPU on a stream of its own; the current stream quantizes what is whole.

    Attributes:
        homes: what holds each tensor's own bytes; None for one that is quantized.
        extremes: of each tensor or its scales, the least and the largest; they are NaN where one
            value is.
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
            values = self._slots[stored.name].quantize(values)
            self._staging[0].vacated.record(self._kernels)
        else:
            self.homes[stored.name] = self._slots[stored.name].settle(values)
        # two numbers, where isfinite() would make a temporary as large as the embeddings
        self.extremes.append(torch.stack(values.aminmax()).float())
        self._report(len(self.extremes), self._num_tensors)

    def settle(self) -> None:
        """Keep whatever runs next on the GPU from memory that is being copied to."""
        self._kernels.wait_stream(self._copies)


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that is kept as it is and holds a NaN or an infinity.

    Raises:
        ValueError: it does.
    """
    # two numbers, where isfinite() would make a temporary as large as the embeddings
    if not bool(torch.stack(tensor.aminmax()).isfinite().all()):
        raise _non_finite_values(name)


def _non_finite_values(name: str) -> ValueError:
    return ValueError(f"{name} must hold finite values only: got NaN or infinity")
