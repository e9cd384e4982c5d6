"""Frozen matrices of one input width, one below the other in one buffer.

In NF4 each matrix is quantized by itself, and the bytes of all lie one after the other; otherwise
the buffer has the checkpoint's dtype. Checkpoints know the matrices by name; a name may also stand
for several of them in one tensor.

    q_proj | k_proj | v_proj            LinearGroup: (sum of rows, in_features)
    0.gate_proj | 0.up_proj | 1. ...    ExpertGroup: the same, one expert behind the other
    input_linear                        one tensor of three dimensions, a matrix an expert
"""

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from kernels.nf4_quantize import nf4_quantize_member_unchecked
from nf4.weight import NF4Weight, Quantization, empty_weight, member


class FrozenGroup(nn.Module):
    """Matrices of one input width, in NF4 or in the checkpoint's dtype, with optional biases.

    Attributes:
        names: of the tensors in checkpoints, without ".weight".
        rows: of each matrix of each tensor.
        num_stacked: matrices of a tensor of three dimensions; None: tensors are matrices.
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
    ) -> None:
        super().__init__()
        self.names = names
        self.rows = rows
        self.in_features = in_features
        self.has_bias = has_bias
        self.num_stacked = num_stacked
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
        stack = () if self.num_stacked is None else (self.num_stacked,)
        return {
            name: (*stack, rows, self.in_features)
            for name, rows in zip(self.names, self.rows, strict=True)
        }

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
        the checkpoint; None for a quantized weight."""
        member_name, kind = name.rsplit(".", 1)
        if kind == "weight" and isinstance(self.weight, NF4Weight):
            return None
        buffer = self.bias if kind == "bias" else self.weight
        assert isinstance(buffer, Tensor)
        rows = buffer[self.row_slices()[self.names.index(member_name)]]
        return rows if self.num_stacked is None else rows.unflatten(0, (self.num_stacked, -1))

    def member(self, name: str) -> NF4Weight:
        """View a quantized matrix ("q_proj") as a weight of its own."""
        assert isinstance(self.weight, NF4Weight)
        assert self.num_stacked is None
        return member(self.weight, self.names.index(name))

    def quantize(self, name: str, tensor: Tensor, checkpoint_name: str) -> Tensor:
        """Quantize a tensor ("q_proj.weight") into the buffers, without waiting for the device.

        Returns:
            The scales, float32: one that is not finite tells of a weight that is not.
        """
        assert isinstance(self.weight, NF4Weight)
        matrices = [tensor] if self.num_stacked is None else list(tensor)
        first = self.names.index(name.rsplit(".", 1)[0]) * len(matrices)
        scales = [
            nf4_quantize_member_unchecked(self.weight, first + i, matrix, checkpoint_name)
            for i, matrix in enumerate(matrices)
        ]
        return scales[0] if len(scales) == 1 else torch.cat(scales)

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
