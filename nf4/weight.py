"""One quantized weight: the record that the rooms above pass around, and how it is made and read.

A weight may hold several matrices with the same number of columns, one below the other: q, k and v
of an attention, gate and up of an MLP. Each of these members is quantized by itself (its blocks,
groups of blocks and mean start anew), and their bytes lie one after the other. So one launch
expands them all, and each member's bytes are those that bitsandbytes writes. The record is no
tensor subclass: code that takes a quantized weight names it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from nf4.blockwise import (
    check_block_size,
    check_quantizable,
    dequantize_blockwise,
    quantize_blockwise,
)
from nf4.double_quant import GROUP_SIZE, QuantizedAbsmax, dequantize_absmax, quantize_absmax


class Quantization(NamedTuple):
    """How a weight is quantized to NF4.

    Attributes:
        block_size: consecutive weights that share a scale.
        double_quant: whether the scales are quantized too.
    """

    block_size: int
    double_quant: bool


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """Matrices of shape (rows[i], in_features), stacked and quantized to NF4."""

    packed: Tensor  # (num_bytes,) uint8, even element in the high nibble
    absmax: Tensor | QuantizedAbsmax  # (num_blocks,) float32, or the same double-quantized
    rows: tuple[int, ...]  # of each member
    in_features: int
    block_size: int

    @property
    def shape(self) -> tuple[int, int]:
        return sum(self.rows), self.in_features

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def is_double_quantized(self) -> bool:
        return isinstance(self.absmax, QuantizedAbsmax)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What holds the weight: codes and scales."""
        if isinstance(self.absmax, QuantizedAbsmax):
            return self.packed, self.absmax.codes, self.absmax.group_absmax, self.absmax.mean
        return self.packed, self.absmax

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory held."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class MemberSpan:
    """Where one member of a weight begins in each of its buffers, and its length there."""

    row: int
    packed: slice
    blocks: slice
    groups: slice
    num_elements: int


@cache
def member_spans(
    rows: tuple[int, ...], in_features: int, block_size: int
) -> tuple[MemberSpan, ...]:
    """Lay the members of a weight out one after the other in whole bytes, blocks and groups of
    blocks."""
    spans = []
    row = byte = block = group = 0
    for num_rows in rows:
        num_elements = num_rows * in_features
        next_byte = byte + (num_elements + 1) // 2
        next_block = block + -(-num_elements // block_size)
        next_group = group + -(-(next_block - block) // GROUP_SIZE)
        spans.append(
            MemberSpan(
                row,
                slice(byte, next_byte),
                slice(block, next_block),
                slice(group, next_group),
                num_elements,
            )
        )
        row, byte, block, group = row + num_rows, next_byte, next_block, next_group
    return tuple(spans)


def empty_weight(
    rows: Sequence[int], in_features: int, block_size: int, double_quant: bool, device: torch.device
) -> NF4Weight:
    """Allocate a weight whose members `quantize_member` fills one at a time.

    Raises:
        ValueError: the block size is not one of BLOCK_SIZES, there is no member, or one is empty.
    """
    check_block_size(block_size)
    if not rows or min(rows) < 1 or in_features < 1:
        raise ValueError(
            "a weight must have at least one member, each with rows and columns: "
            f"got rows {tuple(rows)} and in_features {in_features}"
        )
    last = member_spans(tuple(rows), in_features, block_size)[-1]
    packed = torch.empty(last.packed.stop, dtype=torch.uint8, device=device)
    absmax: Tensor | QuantizedAbsmax
    if double_quant:
        absmax = QuantizedAbsmax(
            torch.empty(last.blocks.stop, dtype=torch.uint8, device=device),
            torch.empty(last.groups.stop, dtype=torch.float32, device=device),
            torch.empty(len(rows), dtype=torch.float32, device=device),
        )
    else:
        absmax = torch.empty(last.blocks.stop, dtype=torch.float32, device=device)
    return NF4Weight(packed, absmax, tuple(rows), in_features, block_size)


def members(weight: NF4Weight, chosen: slice) -> NF4Weight:
    """View some members of a weight, one after the other, as a weight of their own."""
    spans = member_spans(weight.rows, weight.in_features, weight.block_size)[chosen]
    first, last = spans[0], spans[-1]
    blocks = slice(first.blocks.start, last.blocks.stop)
    absmax: Tensor | QuantizedAbsmax
    if isinstance(weight.absmax, QuantizedAbsmax):
        absmax = QuantizedAbsmax(
            weight.absmax.codes[blocks],
            weight.absmax.group_absmax[first.groups.start : last.groups.stop],
            weight.absmax.mean[chosen],
        )
    else:
        absmax = weight.absmax[blocks]
    packed = weight.packed[first.packed.start : last.packed.stop]
    return NF4Weight(packed, absmax, weight.rows[chosen], weight.in_features, weight.block_size)


def member(weight: NF4Weight, index: int) -> NF4Weight:
    """View one member of a weight as a weight of its own."""
    place = range(len(weight.rows))[index]
    return members(weight, slice(place, place + 1))


def pick_parts(
    weight: NF4Weight,
    num_parts: int,
    picked: Tensor,  # (P,) int64
) -> NF4Weight:
    """Copy some parts of a weight whose parts are alike, without looking at which; one may come
    several times."""

    def pick(buffer: Tensor) -> Tensor:
        return buffer.view(num_parts, -1)[picked].flatten()

    absmax: Tensor | QuantizedAbsmax
    if isinstance(weight.absmax, QuantizedAbsmax):
        scales = weight.absmax
        absmax = QuantizedAbsmax(pick(scales.codes), pick(scales.group_absmax), pick(scales.mean))
    else:
        absmax = pick(weight.absmax)
    rows = weight.rows[: len(weight.rows) // num_parts] * len(picked)
    return NF4Weight(pick(weight.packed), absmax, rows, weight.in_features, weight.block_size)


def check_matrix(target: NF4Weight, matrix: Tensor, name: str) -> None:
    """Refuse a matrix that cannot become `target`, whatever its values.

    Raises:
        ValueError: the matrix has another shape, lies on another device, or is not floating point.
    """
    if tuple(matrix.shape) != target.shape:
        raise ValueError(f"{name} must have shape {target.shape}: got {tuple(matrix.shape)}")
    if matrix.device != target.device:
        raise ValueError(
            f"{name} must lie on the device of the weight that takes it, {target.device}: "
            f"got {matrix.device}"
        )
    check_quantizable(matrix, name)


def check_finite(
    absmax: Tensor,  # (num_blocks,) float32
    matrix: Tensor,
    name: str,
) -> None:
    """Refuse the matrix with these scales if a scale, and thus a weight, is not finite.

    Raises:
        ValueError: a scale is a NaN or an infinity.
    """
    if not bool(absmax.isfinite().all()):
        raise non_finite_weights(matrix, name)


def non_finite_weights(matrix: Tensor, name: str) -> ValueError:
    """Make the error about a matrix that holds a NaN or an infinity."""
    num_bad = int((~matrix.isfinite()).sum())
    return ValueError(
        f"{name} must hold finite weights only: {num_bad} of {matrix.numel()} are NaN or "
        "infinite; the checkpoint is damaged or was saved from a diverged run"
    )


def quantize_member(
    weight: NF4Weight,
    index: int,
    matrix: Tensor,  # (rows[index], in_features), on the weight's device
    name: str,
) -> None:
    """Quantize a matrix into one member of a weight, in place.

    Args:
        name: what an error calls the matrix: its name in the checkpoint.

    Raises:
        ValueError: the matrix has another shape or lies on another device, is not floating point,
            or holds a NaN or an infinity.

    Note:
        Synchronizes with the device once, to look for non-finite weights.
    """
    target = member(weight, index)
    check_matrix(target, matrix, name)
    packed, absmax = quantize_blockwise(matrix, weight.block_size, name)
    check_finite(absmax, matrix, name)
    _store(target, packed, absmax)


def quantize_member_unchecked(
    weight: NF4Weight,
    index: int,
    matrix: Tensor,  # (rows[index], in_features), on the weight's device
    name: str,
) -> Tensor:  # (num_blocks,) float32
    """Quantize a matrix into one member of a weight, in place, whatever its values.

    Returns:
        The scales before double quantization. One of them is not finite where a weight of its
        block is not; then the member holds no weight.

    Raises:
        ValueError: the matrix has another shape or lies on another device, or is not floating
            point.
    """
    target = member(weight, index)
    check_matrix(target, matrix, name)
    packed, absmax = quantize_blockwise(matrix, weight.block_size, name)
    _store(target, packed, absmax)
    return absmax


def _store(target: NF4Weight, packed: Tensor, absmax: Tensor) -> None:
    target.packed.copy_(packed)
    if isinstance(target.absmax, QuantizedAbsmax):
        quantized = quantize_absmax(absmax)
        target.absmax.codes.copy_(quantized.codes)
        target.absmax.group_absmax.copy_(quantized.group_absmax)
        target.absmax.mean.copy_(quantized.mean)
    else:
        target.absmax.copy_(absmax)


def quantize(
    matrix: Tensor, block_size: int = 64, double_quant: bool = True, name: str = "weight"
) -> NF4Weight:
    """Quantize one matrix to NF4.

    Raises:
        ValueError: the block size is not one of BLOCK_SIZES, or the matrix is empty, no matrix,
            not floating point, or holds a NaN or an infinity.
    """
    if matrix.dim() != 2 or matrix.numel() == 0:
        raise ValueError(f"{name} must be a non-empty matrix: got shape {tuple(matrix.shape)}")
    num_rows, in_features = matrix.shape
    weight = empty_weight((num_rows,), in_features, block_size, double_quant, matrix.device)
    quantize_member(weight, 0, matrix, name)
    return weight


def dequantize(weight: NF4Weight, dtype: torch.dtype) -> Tensor:  # (sum(rows), in_features) dtype
    """Expand a weight to floats, member by member.

        W[n, k] = LEVELS[code] * absmax[block of (n, k)]

    The reference of every kernel and the CPU path.
    """
    matrices = []
    for index, num_rows in enumerate(weight.rows):
        part = member(weight, index)
        absmax = part.absmax
        if isinstance(absmax, QuantizedAbsmax):
            absmax = dequantize_absmax(absmax)
        num_elements = num_rows * weight.in_features
        flat = dequantize_blockwise(part.packed, absmax, weight.block_size, num_elements, dtype)
        matrices.append(flat.view(num_rows, weight.in_features))
    return torch.cat(matrices) if len(matrices) > 1 else matrices[0]
