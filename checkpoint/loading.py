"""From an opened checkpoint to a ready model, one tensor at a time.

    on a GPU, three things at once:
    threads    | read 2         | read 3 ...       shard -> pinned ring (checkpoint/shard_reader.py)
    copies     | copy 1         | copy 2 ...       ring -> staging, or home if it is kept as it is
    kernels    | quantize 0     | quantize 1 ...   staging -> its group's buffer

    on the CPU: shard -> home, or memory of its own -> quantized -> its group's buffer

    stored NF4, on both: codes and scales go home unchanged
    MXFP4, on both: scales -> kept; then blocks -> an expert at a time, expanded and quantized

The peak is the packed model, plus one tensor on the CPU or two on a GPU (the largest of those that
are quantized, in the checkpoint's dtype), plus the quantizer's bounded temporaries. Embeddings,
norms and all other tensors that are not quantized are read into their homes directly. A load onto a
GPU also holds 128 MiB of pinned host memory.

Each tensor is searched for NaN and infinity as it arrives; a GPU keeps the results until it is
asked once, at the end.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from checkpoint.device_sink import DeviceSink
from checkpoint.opening import Checkpoint
from checkpoint.shard_reader import Report, StoredTensor, make_ring, read_tensor, stream
from checkpoint.slots import HEAD, META, Slot, embeddings_name, kept_dtype, slots_of
from checkpoint.stored_nf4 import describe_quantization
from llama.model import Llama
from lora.frozen_group import FrozenGroup
from nf4.serialized import restore_state
from nf4.weight import Quantization, non_finite_weights

CPU = torch.device("cpu")


def load_sizes(
    checkpoint: Checkpoint, compute_dtype: torch.dtype, quantization: Quantization | None
) -> Llama:
    """Make a model on the meta device with the same tensors as `load_model`, without values.

    Raises:
        ValueError: as `load_model`, except where a tensor's values are wrong.
    """
    model = _allocated(checkpoint, META, compute_dtype, quantization)
    slots = slots_of(model, checkpoint.stored, checkpoint.nf4.states)
    for tensor in checkpoint.needed():
        dtype = kept_dtype(model.config, tensor.name, tensor.dtype, compute_dtype)
        slots[tensor.name].home(dtype, META)
    return model.eval()


def load_model(
    checkpoint: Checkpoint,
    device: torch.device,
    compute_dtype: torch.dtype,
    quantization: Quantization | None,
    report: Report = lambda done, total: None,
) -> Llama:
    """Load a checkpoint's model, frozen, with the head in the compute dtype.

    Linear groups are quantized while they load. Weights that are stored in NF4 keep their codes and
    scales, and the groups that such a checkpoint stores in 16 or 32 bits keep their numbers.

    Args:
        quantization: the linear groups' form in memory; None keeps it as stored. Of a checkpoint in
            NF4 it must be `checkpoint.quantization`.
        report: called as `report(done, total)` after each tensor.

    Raises:
        FileNotFoundError: a shard is gone.
        ValueError: a shard was changed since the checkpoint was opened, the checkpoint is in NF4
            with another quantization, members of a group have different dtypes, or a tensor holds
            a NaN or an infinity.
    """
    checkpoint.check_unchanged()
    model = _allocated(checkpoint, device, compute_dtype, quantization)
    slots = slots_of(model, checkpoint.stored, checkpoint.nf4.states)
    wanted = checkpoint.needed()
    if device.type == "cpu":
        _load_on_cpu(wanted, slots, report)
    else:
        _load_on_gpu(wanted, slots, device, report)
    checkpoint.check_tied_head()
    return model.eval()


def describe_loading(checkpoint: Checkpoint, compute_dtype: torch.dtype) -> list[str]:
    """List the checkpoint's remarks, and the tensors that are not kept in their stored dtype."""
    embeddings = embeddings_name(checkpoint.config)
    converted = {"embeddings": (embeddings, checkpoint.embeddings)}
    if not checkpoint.config.tie_word_embeddings:
        converted["head"] = (HEAD, checkpoint.stored[HEAD])
    lines = checkpoint.remarks
    for what, (name, tensor) in converted.items():
        kept = kept_dtype(checkpoint.config, name, tensor.dtype, compute_dtype)
        if kept != tensor.dtype:
            lines.append(f"{what}: stored in {tensor.dtype}, kept in {kept}, the compute dtype")
    return lines


def _allocated(
    checkpoint: Checkpoint,
    device: torch.device,
    compute_dtype: torch.dtype,
    quantization: Quantization | None,
) -> Llama:
    """Make a checkpoint's model, and allocate its groups on a device."""
    if checkpoint.quantization not in (None, quantization):
        raise ValueError(
            f"{checkpoint.folder} must be loaded as it is stored: it is in NF4 with "
            f"{describe_quantization(checkpoint.quantization)}, asked for is "
            f"{describe_quantization(quantization)}"
        )
    with META:
        model = Llama(checkpoint.config, compute_dtype)
    for prefix, group in model.frozen_groups():
        _allocate(checkpoint, prefix, group, device, quantization)
    model.move_constants(device)
    return model


def _allocate(
    checkpoint: Checkpoint,
    prefix: str,
    group: FrozenGroup,
    device: torch.device,
    quantization: Quantization | None,
) -> None:
    """Allocate the weights and biases of one group."""
    states = checkpoint.nf4.states
    weights = [f"{prefix}{name}.weight" for name in group.names]
    biases = [f"{prefix}{name}.bias" for name in group.names] if group.has_bias else []
    if states:
        # the groups that a checkpoint in NF4 stores in 16 or 32 bits are not quantized either
        quantization = states[weights[0]].quantization if weights[0] in states else None
    # quantized members keep no dtype, so theirs may differ
    weight_dtype = None if quantization else _shared_dtype(checkpoint, weights)
    bias_dtype = _shared_dtype(checkpoint, biases) if biases else None
    group.allocate(device, weight_dtype, bias_dtype, quantization)
    for name, weight in zip(group.names, weights, strict=True):
        if weight in states:
            restore_state(group.member(name), states[weight])


def _shared_dtype(checkpoint: Checkpoint, names: Sequence[str]) -> torch.dtype:
    """Find the one dtype of tensors that share a buffer."""
    dtypes = {checkpoint.weight_dtype(name) for name in names}
    if len(dtypes) > 1:
        raise ValueError(
            f"{checkpoint.folder}: {', '.join(names)} must share a dtype: "
            f"got {', '.join(sorted(str(dtype) for dtype in dtypes))}"
        )
    return dtypes.pop()


def _load_on_cpu(wanted: list[StoredTensor], slots: dict[str, Slot], report: Report) -> None:
    """Read one tensor after the other into its home, or quantize it."""
    for done, stored in enumerate(wanted, start=1):
        slot = slots[stored.name]
        home = slot.home(stored.dtype, CPU)
        if home is None:
            matrix = read_tensor(stored)
            if not bool(slot.place(matrix).isfinite().all()):
                raise _non_finite_weights(matrix, stored.name)
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
    sink = DeviceSink(wanted, slots, device, report)
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
        raise _non_finite_weights(read_tensor(tensor), tensor.name)


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a tensor with a NaN or an infinity, of those that are not quantized.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    # two numbers, where isfinite() would make a temporary as large as the embeddings
    if not bool(torch.stack(tensor.aminmax()).isfinite().all()):
        raise _non_finite_values(name)


def _non_finite_weights(matrix: Tensor, name: str) -> ValueError:
    if matrix.dtype != torch.uint8:
        return non_finite_weights(matrix, name)
    return ValueError(
        f"{name} must stand for finite weights: one of their scales is NaN, or too large for its "
        "block; the checkpoint is damaged, download it again"
    )


def _non_finite_values(name: str) -> ValueError:
    return ValueError(f"{name} must hold finite values only: got NaN or infinity")
