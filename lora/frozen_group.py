"""Frozen matrices of one input width, one below the other in one buffer.

In NF4 each matrix is quantized by itself, and the bytes of all lie one after the other; otherwise
the buffer has the checkpoint's dtype. Checkpoints know the matrices by name; a name may also stand
for several of them in one tensor.

    q_proj | k_proj | v_proj            LinearGroup: (sum of rows, in_features)
    0.gate_proj | 0.up_proj | 1. ...    ExpertGroup: the same, one expert behind the other
    input_linear                        one tensor of three dimensions, a matrix an expert, as
                                        `stacked_layout.py` lays it out
"""

from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from kernels.nf4_quantize import nf4_quantize_member_unchecked
from lora.stacked_layout import BY_ROWS, StackedLayout
from nf4.weight import NF4Weight, Quantization, empty_weight, member


class FrozenGroup(nn.Module):
    """Matrices of one input width, in NF4 or in the checkpoint's dtype, with optional biases.

    Attributes:
        names: of the tensors in checkpoints, without ".weight".
        rows: of each matrix of each tensor.
        num_stacked: matrices of a tensor of three dimensions; None: tensors are matrices.
        layout: of such a matrix, and of its bias, in checkpoints.
    """

    weight: NF4Weight | Tensor  # (sum of rows, in_features)
    bias: Tensor | None  # (sum of rows,)
    # the weight as the products read it, where it stays from pass to pass; None: it does not
    expanded: Any

    def __init__(
        self,
        names: tuple[str, ...],
        rows: tuple[int, ...],
        in_features: int,
        has_bias: bool = False,
        num_stacked: int | None = None,
        layout: StackedLayout = BY_ROWS,
    ) -> None:
        super().__init__()
        self.names = names
        self.rows = rows
        self.in_features = in_features
        self.has_bias = has_bias
        self.num_stacked = num_stacked
        self.layout = layout
        self.expanded = None

    @property
    def num_rows(self) -> int:
        return sum(self.rows) * (self.num_stacked or 1)

    @property
    def num_frozen(self) -> int:
        """Frozen weights and biases, counted as numbers, not as bytes."""
        return self.num_rows * (self.in_features + self.has_bias)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the weights in checkpoints, by the tensors' names."""
        return {
            name: (*self._stack, *self.layout.shape(rows, self.in_features))
            for name, rows in zip(self.names, self.rows, strict=True)
        }

    def bias_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the biases in checkpoints, by the tensors' names; empty without biases."""
        if not self.has_bias:
            return {}
        return {n: (*self._stack, rows) for n, rows in zip(self.names, self.rows, strict=True)}

    @property
    def _stack(self) -> tuple[int, ...]:
        return () if self.num_stacked is None else (self.num_stacked,)

    def row_slices(self) -> list[slice]:
        """Find the rows of each tensor in the buffer."""
        ends = list(accumulate(rows * (self.num_stacked or 1) for rows in self.rows))
        return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def allocate(
        self,
        device: torch.device,
        weight_dtype: torch.dtype | None,
        bias_dtype: torch.dtype | None,
        quantization: Quantization | None,
    ) -> None:
        """Allocate the frozen weight and the bias, if there is one; loading fills them.

        Args:
            weight_dtype: of a weight that is not quantized.
            bias_dtype: of the bias, which is never quantized.
            quantization: to NF4, or None for a weight as stored.
        """
        if quantization is None:
            self.weight = torch.empty(
                self.num_rows, self.in_features, dtype=weight_dtype, device=device
            )
        else:
            rows = [r for rows in self.rows for r in (rows,) * (self.num_stacked or 1)]
            self.weight = empty_weight(rows, self.in_features, *quantization, device)
        self.bias = (
            torch.empty(self.num_rows, dtype=bias_dtype, device=device) if self.has_bias else None
        )

    def home(self, name: str) -> Tensor | None:
        """Find the rows of the buffer for a tensor's weight or bias ("q_proj.weight"), stored as in
        the checkpoint; None where `place` brings them there."""
        is_quantized = name.endswith(".weight") and isinstance(self.weight, NF4Weight)
        return self._rows_of(name) if self.layout.is_by_rows and not is_quantized else None

    def _rows_of(self, name: str) -> Tensor:
        """View the rows of a weight in 16 or 32 bits, or those of a bias."""
        member_name, kind = name.rsplit(".", 1)
        buffer = self.bias if kind == "bias" else self.weight
        assert isinstance(buffer, Tensor)
        rows = buffer[self.row_slices()[self.names.index(member_name)]]
        return rows.unflatten(0, (*self._stack, -1)) if self._stack else rows

    def member(self, name: str) -> NF4Weight:
        """View a quantized matrix ("q_proj") as a weight of its own."""
        assert isinstance(self.weight, NF4Weight)
        assert self.num_stacked is None
        return member(self.weight, self.names.index(name))

    def place(self, name: str, stored: Iterable[Tensor], checkpoint_name: str) -> Tensor:
        """Bring the matrices of a tensor that has no home ("q_proj.weight"), or its biases, into
        the buffers, quantized if these are, without waiting for the device.

        Args:
            stored: as they lie in the checkpoint; one, where tensors are matrices.

        Returns:
            What is not finite where one of the numbers is not: the scales, float32, or the numbers.
        """
        matrices = map(self.layout.in_rows, stored)
        member_name, kind = name.rsplit(".", 1)
        if kind == "weight" and isinstance(self.weight, NF4Weight):
            first = self.names.index(member_name) * (self.num_stacked or 1)
            scales = [
                nf4_quantize_member_unchecked(self.weight, first + i, matrix, checkpoint_name)
                for i, matrix in enumerate(matrices)
            ]
            return scales[0] if len(scales) == 1 else torch.cat(scales)
        rows = self._rows_of(name)
        for place, matrix in zip(rows if self._stack else (rows,), matrices, strict=True):
            place.copy_(matrix)
        return rows

    def make_tables(self, dtype: torch.dtype) -> None:
        """Copy the tables that kernels read in passes of a dtype to the device, before the first
        pass.

        Note:
            After the group got its weight and its updates.
        """
        raise NotImplementedError

    def keep_expanded(self, dtype: torch.dtype) -> None:
        """Expand the weight once for all passes."""
        raise NotImplementedError

    def expanded_tensors(self) -> Iterator[Tensor]:
        """What stays expanded from pass to pass, where it is a copy."""
        raise NotImplementedError

    def frozen_tensors(self) -> Iterator[Tensor]:
        """The tensors of the weight and the bias, if there is one."""
        yield from self.weight.tensors if isinstance(self.weight, NF4Weight) else (self.weight,)
        if self.bias is not None:
            yield self.bias
