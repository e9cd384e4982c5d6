"""A checkpoint with an adapter's updates merged into its weights, one tensor at a time.

    W' = round(W + s B A)        W as stored, or quantized to NF4 and back

Every file of weights is written again under its name: its header byte for byte, then the tensors in
their order, so shards, index, names, dtypes and metadata are those of the input. In memory is one
tensor as stored, its float32 values where it was quantized to NF4 and back, and otherwise a few of
its rows in float32.

Rounding to 16 bits loses a part of an update; a weight that the update moves by less than half a
unit in the last place loses all of it. `MergeFigures` says how much was lost. PEFT's
merge_and_unload holds the whole model in memory, and does not report the loss.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from checkpoint.shard_reader import Report, Shard, StoredTensor
from kernels.nf4_dequantize import nf4_dequantize
from kernels.nf4_quantize import nf4_quantize_member
from llama.config import LlamaConfig
from llama.model import Llama
from lora.adapter_file import load_adapter, read_adapter_config
from lora.stacked_layout import StackedLayout
from nf4.weight import Quantization, empty_weight

# the most numbers of a weight's rows that are in float32 at once
BLOCK_ELEMENTS = 1 << 24
COPY_BYTES = 8 << 20


class LowRankUpdate(NamedTuple):
    """The update that an adapter adds to one projection's weight: scaling * B A; or to each of
    several matrices that are stored as one tensor."""

    A: Tensor  # (rank, in_features) float32, or (E, rank, in_features)
    B: Tensor  # (rows, rank) float32, or (E, rows, rank)
    scaling: float


@dataclass
class MergeFigures:
    """How much a merge changed and lost, summed over the projections with an update.

    Attributes:
        num_changed: weights that differ from the rounded weights without the update.
        update_squares: the sum of squares of the update's values.
        lost_squares: the sum of squares of the errors that rounding made in them.
    """

    num_tensors: int = 0
    num_weights: int = 0
    num_changed: int = 0
    update_squares: float = 0.0
    lost_squares: float = 0.0

    @property
    def lost(self) -> float:
        """The norm of the rounding error over that of the update; 0 for one of zeros."""
        return math.sqrt(self.lost_squares / self.update_squares) if self.update_squares else 0.0


def read_updates(
    folder: Path,
    config: LlamaConfig,
    read_vocabulary: Callable[[], Mapping[str, Tensor]] = dict,
) -> dict[str, LowRankUpdate]:
    """Read an adapter for a model, by the names of the tensors that it updates.

    Args:
        read_vocabulary: as `lora.adapter_file.load_adapter`.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        ValueError: it is no plain LoRA, belongs to another model, or changes nothing.
    """
    with torch.device("meta"):
        model = Llama(config, torch.float32)
    model.attach_lora(read_adapter_config(folder), seed=0)
    named = {name: torch.empty(t.shape) for name, t in model.adapter_tensors().items()}
    load_adapter(folder, named, read_vocabulary)

    def pair(before: str) -> tuple[Tensor, Tensor]:
        return named[f"{before}lora_A.weight"], named[f"{before}lora_B.weight"]

    updates = {}
    for prefix, group in model.groups():
        for name, size in group.sizes.items():
            updates[prefix + name] = LowRankUpdate(*pair(f"{prefix}{name}."), size.scaling)
    for prefix, experts in model.experts():
        stored = prefix.replace(f".{experts.block}.", ".mlp.")
        for before, group, update in experts.updates():
            for name, A, B in group.split(*pair(prefix + before)):
                updates[stored + name] = LowRankUpdate(A, B, update.scaling)
    if not any(bool(update.A.any()) and bool(update.B.any()) for update in updates.values()):
        raise ValueError(
            f"the adapter in {folder} must change something: every lora_B or lora_A of it is zero, "
            "as before the first step of training"
        )
    return updates


def write_merged_shards(
    shards: Sequence[Shard],
    layouts: Mapping[str, StackedLayout | None],
    updates: Mapping[str, LowRankUpdate],
    quantization: Quantization | None,
    device: torch.device,
    folder: Path,
    report: Report = lambda done, total: None,
) -> MergeFigures:
    """Write the files of a checkpoint into a folder, with the updates in their weights.

    Args:
        shards: the files of the checkpoint.
        layouts: of its weights that NF4 is for, experts' too, by their paths; None: one matrix.
        quantization: with which each of these weights is first quantized and dequantized, as
            while the adapter was trained; None: the update is added to the weights as stored.
        device: where a tensor is merged.
        report: called as `report(done, total)` after each tensor.

    Raises:
        FileNotFoundError, ValueError: as `Shard.check_unchanged`, or a weight is not finite, or
            would not be with its update, or a tensor to be updated is not there.
    """
    figures = MergeFigures()
    total = sum(len(shard.tensors) for shard in shards)
    stored = {tensor.name.removesuffix(".weight") for shard in shards for tensor in shard.tensors}
    if missing := sorted(updates.keys() - stored):
        raise ValueError(
            f"the checkpoint must hold every tensor that the adapter updates: got no {missing[0]}"
        )
    done = 0
    for shard in shards:
        shard.check_unchanged()
        with shard.path.open("rb") as source, (folder / shard.path.name).open("wb") as target:
            for tensor in shard.tensors:
                _copy(source, target, tensor.start - source.tell())
                projection = tensor.name.removesuffix(".weight")
                update = updates.get(projection)
                if update is not None or (quantization and projection in layouts):
                    W = _read(source, tensor).to(device)
                    layout = layouts.get(projection)
                    if layout is None:
                        merged = _merged(W, tensor.name, update, quantization, figures)
                    else:
                        merged = _merged_stack(
                            W, tensor.name, layout, update, quantization, figures
                        )
                    target.write(merged.cpu().view(-1).view(torch.uint8).numpy().data)
                else:
                    _copy(source, target, tensor.num_bytes)
                done += 1
                report(done, total)
    return figures


def _copy(source: BinaryIO, target: BinaryIO, num_bytes: int) -> None:
    while num_bytes:
        piece = source.read(min(num_bytes, COPY_BYTES))
        if not piece:
            raise _truncated(source)
        target.write(piece)
        num_bytes -= len(piece)


def _read(source: BufferedReader, tensor: StoredTensor) -> Tensor:
    data = torch.empty(tensor.num_bytes, dtype=torch.uint8)
    # a buffered file reads all there is
    if source.readinto(data.numpy().data) != tensor.num_bytes:
        raise _truncated(source)
    return data.view(tensor.dtype).view(tensor.shape)


def _truncated(source: BinaryIO) -> ValueError:
    return ValueError(f"{source.name} was truncated while it was read; download it again")


def _row_blocks(shape: tuple[int, int]) -> Iterator[slice]:
    rows = max(1, BLOCK_ELEMENTS // shape[1])
    for start in range(0, shape[0], rows):
        yield slice(start, start + rows)


def _merged(
    W: Tensor,  # (N, K) as stored
    name: str,
    update: LowRankUpdate | None,
    quantization: Quantization | None,
    figures: MergeFigures,
) -> Tensor:  # (N, K) W's dtype
    """Add an update to a weight in float32, round once, and add up the figures."""
    N, K = W.shape
    base = W if quantization is None else _quantized(W, name, quantization)
    if update is None:
        return base.to(W.dtype)
    A, B = update.A.to(W.device), update.B.to(W.device)
    merged = torch.empty_like(W)
    for rows in _row_blocks((N, K)):
        before = base[rows].float()
        change = (B[rows] @ A).mul_(update.scaling)
        merged[rows] = before + change
        if not bool(merged[rows].isfinite().all()):
            raise ValueError(
                f"{name} must stay finite with its update: a weight is NaN or infinite in "
                f"{W.dtype}; the base or the adapter is damaged, or the update too large for it"
            )
        figures.num_changed += int((merged[rows] != base[rows].to(W.dtype)).sum())
        figures.update_squares += _squares(change)
        # the change that arrived, less the update: each difference is exact but for float32's last
        # bit
        figures.lost_squares += _squares((merged[rows].float() - before).sub_(change))
    figures.num_tensors += 1
    figures.num_weights += W.numel()
    return merged


def _quantized(W: Tensor, name: str, quantization: Quantization) -> Tensor:  # (N, K) float32
    """Quantize a matrix and back."""
    weight = empty_weight((W.shape[0],), W.shape[1], *quantization, W.device)
    nf4_quantize_member(weight, 0, W, name)
    return nf4_dequantize(weight, torch.float32)


def _merged_stack(
    W: Tensor,  # (E, ., .) as stored
    name: str,
    layout: StackedLayout,
    update: LowRankUpdate | None,
    quantization: Quantization | None,
    figures: MergeFigures,
) -> Tensor:  # as W
    """Merge the matrices of all experts one by one, as rows, which they are in training."""
    parts: list[LowRankUpdate | None] = [None] * len(W)
    if update is not None:
        pairs = zip(update.A, update.B, strict=True)
        parts = [LowRankUpdate(A, B, update.scaling) for A, B in pairs]
    merged = torch.empty_like(W)
    for place, stored, part in zip(merged, W, parts, strict=True):
        matrix = _merged(layout.in_rows(stored), name, part, quantization, figures)
        place.copy_(layout.as_stored(matrix))
    return merged


def _squares(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
