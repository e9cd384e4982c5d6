"""A group's frozen weight as its two products read it, with the low-rank updates beside it.

    forward     y      = x W^T + h (s B)^T           backward    grad_x = grad_y W + grad_h A

In 16 bits W and the updates lie in one buffer and share each product; in 8 bits the updates keep 16
and are added to the same sums:

    SixteenBits     | W | s B |          EightBits       W in E4M3 or INT8, W^T in E4M3
                    | A |     |                          A, s B

Before a pass `write_updates` fills A and s B. x and grad_y come with h and grad_h in their tails,
and x in 8 bits too where the kernel that produced it wrote that. Gradients are quantized some rows
at a time when they are multiplied: all of gate | up at once would be the most that a pass has in
memory.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.fp8 import E4M3, Fp8Weight, LowRankTail, empty_fp8_rows
from kernels.matmul_8bit import matmul_8bit
from kernels.nf4_to_fp8 import nf4_to_fp8
from kernels.nf4_to_int8 import nf4_to_int8
from kernels.rotation import INT8, EightBitWeight
from kernels.rows_8bit import empty_8bit_rows, quantize_rows
from lora.rows import Rows
from nf4.weight import NF4Weight

# about the rows of a product by a weight as it lies: of twice as many cuBLAS takes 3 to 5 % more
# time a row on an H200, while products by the transposed weight take the same
PART_ROWS = 8192
# about the rows of gradients that are in E4M3 at once: as many bytes as an 8B's widest weight has
QUANTIZED_ROWS = 4096


class SixteenBits(NamedTuple):
    """A weight in the dtype of the passes."""

    W_ext: Tensor  # (N + T, K + T)
    num_rows: int
    in_features: int

    @property
    def A(self) -> Tensor:  # (T, K)
        return self.W_ext[self.num_rows :, : self.in_features]

    @property
    def sB(self) -> Tensor:  # (N, T)
        return self.W_ext[: self.num_rows, self.in_features :]

    def multiply(self, x: Rows, bias: Tensor | None, out: Tensor | None) -> Tensor:
        """Multiply (M, K + T) rows to (M, N)."""
        W = self.W_ext[: self.num_rows].T
        if bias is None:
            return torch.mm(x.ext, W, out=out)
        return torch.addmm(bias, x.ext, W, out=out)

    def multiply_back(self, grad_ext: Tensor, has_updates: bool) -> Tensor:
        """Multiply (M, N + T) gradients to (M, K), the updates' part included or not."""
        W = self.W_ext[:, : self.in_features]
        if not has_updates:
            grad_ext, W = grad_ext[:, : self.num_rows], W[: self.num_rows]
        out = grad_ext.new_empty(grad_ext.shape[0], self.in_features)
        num_parts = max(grad_ext.shape[0] // PART_ROWS, 1)
        for part, rows in zip(out.chunk(num_parts), grad_ext.chunk(num_parts), strict=True):
            torch.mm(rows, W, out=part)
        return out

    def kept(self, has_forward: bool) -> "SixteenBits":
        """What stays from pass to pass."""
        return self

    def tensors(self) -> Iterator[Tensor]:
        """What it holds."""
        yield self.W_ext


class EightBits(NamedTuple):
    """An NF4 weight whose base products are of 8 bits, expanded for each unless it stays."""

    weight: NF4Weight
    scale: Tensor  # () float32, of the weight in E4M3
    int8_scales: Tensor | None  # (N,) float32, of its rows in INT8; None: E4M3 forward too
    A: Tensor  # (T, K)
    sB: Tensor  # (N, T)
    W: EightBitWeight | None = None
    W_transposed: Fp8Weight | None = None

    def multiply(self, x: Rows, bias: Tensor | None, out: Tensor | None) -> Tensor:
        """Multiply (M, K + T) rows to (M, N)."""
        N, K = self.weight.shape
        y = x.ext.new_empty(x.ext.shape[0], N) if out is None else out
        W = self._forward_weight() if self.W is None else self.W
        tail = LowRankTail(x.ext[:, K:], self.sB) if self.sB.shape[1] else None
        rows = x.in_8_bits
        if rows is None:
            M, device = x.ext.shape[0], x.ext.device
            rows = quantize_rows(x.ext[:, :K], empty_8bit_rows((M, K), self.format, device))
        matmul_8bit(rows, W, y, tail, bias)
        return y

    @property
    def format(self) -> torch.dtype:
        """The forward product's number format."""
        return E4M3 if self.int8_scales is None else INT8

    def _forward_weight(self) -> EightBitWeight:
        if self.int8_scales is None:
            return nf4_to_fp8(self.weight, self.scale)
        return nf4_to_int8(self.weight, self.int8_scales)

    def multiply_back(self, grad_ext: Tensor, has_updates: bool) -> Tensor:
        """Multiply (M, N + T) gradients to (M, K), the updates' part included or not."""
        N, K = self.weight.shape
        W = self.W_transposed
        if W is None:
            W = nf4_to_fp8(self.weight, self.scale, is_transposed=True)
        out = grad_ext.new_empty(grad_ext.shape[0], K)
        num_parts = max(grad_ext.shape[0] // QUANTIZED_ROWS, 1)
        for part, rows in zip(out.chunk(num_parts), grad_ext.chunk(num_parts), strict=True):
            tail = LowRankTail(rows[:, N:], self.A.T) if has_updates else None
            grad_y = quantize_rows(rows[:, :N], empty_fp8_rows((len(rows), N), rows.device))
            matmul_8bit(grad_y, W, part, tail)
        return out

    def kept(self, has_forward: bool) -> "EightBits":
        """What stays from pass to pass: W where it is multiplied forward too, and W^T."""
        return self._replace(
            W=self._forward_weight() if has_forward else None,
            W_transposed=nf4_to_fp8(self.weight, self.scale, is_transposed=True),
        )

    def tensors(self) -> Iterator[Tensor]:
        """What it holds beside the packed weight."""
        yield from (self.A, self.sB)
        for expanded in (self.W, self.W_transposed):
            if expanded is not None:
                yield expanded.values


Expansion = SixteenBits | EightBits
