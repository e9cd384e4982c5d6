"""The frozen projections of all experts of a layer, one behind the other, and their products, with
optional low-rank updates.

    gate_up   | 0.gate_proj | 0.up_proj | 1.gate_proj | ...        (E 2 F, D)
    down      | 0.down_proj | 1.down_proj | ...                    (E D, F)

Rows come sorted by expert, so that each expert multiplies rows that lie together, and one grouped
product serves all of them. Packed weights are expanded for that a few experts at a time: all
experts of a layer in 16 bits would take as much memory as several layers in NF4. transformers
keeps experts in one tensor of three dimensions, which bitsandbytes does not quantize.

    R = M k rows of sorted tokens, E experts, N rows and K columns of an expert
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.grouped_matmul import grouped_matmul, grouped_matmul_backward_input
from kernels.nf4_decode import make_nf4_tables
from kernels.nf4_dequantize import nf4_dequantize
from lora.config import UpdateSize
from lora.expert_update import ExpertUpdate
from lora.frozen_group import FrozenGroup
from lora.stacked_layout import BY_ROWS, StackedLayout
from nf4.weight import NF4Weight, members, pick_parts

# the most bytes of expanded weights at a time, but for one expert that has more
EXPANDED_BYTES = 128 << 20


class ExpertGroup(FrozenGroup):
    """A projection, or several of one input, of each expert.

        y[r] = W_e x[r] + b_e        offsets[e] <= r < offsets[e + 1]

    Attributes:
        num_experts: whose matrices lie one behind the other, the same of each.
        update: of each expert, for the caller to add; None: there is none.
    """

    expanded: Tensor | None  # all experts' matrices
    update: ExpertUpdate | None

    def __init__(
        self,
        names: tuple[str, ...],
        rows: tuple[int, ...],
        in_features: int,
        num_experts: int,
        num_stacked: int | None = None,
        has_bias: bool = False,
        layout: StackedLayout = BY_ROWS,
    ) -> None:
        super().__init__(names, rows, in_features, has_bias, num_stacked, layout)
        self.num_experts = num_experts
        self.update = None

    @property
    def rows_of_one(self) -> int:
        """The rows of one expert."""
        return self.num_rows // self.num_experts

    @property
    def biases(self) -> Tensor | None:
        """The bias of each expert, (E, N)."""
        return None if self.bias is None else self.bias.view(self.num_experts, -1)

    def attach(self, size: UpdateSize, device: torch.device, generator: torch.Generator) -> None:
        """Give every expert an update that starts at zero."""
        assert self.update is None, "a group takes one adapter"
        shape = (self.num_experts, self.rows_of_one, self.in_features)
        turns = self.layout.num_in_turn
        self.update = ExpertUpdate(shape, size, device, generator, turns)

    def expanded_shape(self, dtype: torch.dtype) -> tuple[int, int, int]:
        """The most experts that are expanded together, and the rows and columns of each."""
        rows, columns = self.rows_of_one, self.in_features
        num_together = max(1, EXPANDED_BYTES // (rows * columns * dtype.itemsize))
        return min(self.num_experts, num_together), rows, columns

    def forward(
        self,
        x: Tensor,  # (R, K), sorted by expert
        offsets: Tensor,  # (E + 1,) int32, on x's device
    ) -> Tensor:  # (R, N)
        """Apply to each row the matrices of its expert, without an update."""
        y, biases = x.new_empty(x.shape[0], self.rows_of_one), self.biases
        for first, W in self._expanded(x.dtype):
            bias = None if biases is None else biases[first : first + len(W)]
            grouped_matmul(x, W, offsets, out=y, first_expert=first, bias=bias)
            # gone before the next ones are expanded
            del W
        return y

    def backward(
        self,
        grad_y: Tensor,  # (R, N), sorted by expert
        offsets: Tensor,  # (E + 1,) int32
    ) -> Tensor:  # (R, K)
        """Compute x's gradient, without an update.

        grad_x[r] = W_e^T grad_y[r]        offsets[e] <= r < offsets[e + 1]
        """
        grad_x = grad_y.new_empty(grad_y.shape[0], self.in_features)
        for first, W in self._expanded(grad_y.dtype):
            grouped_matmul_backward_input(grad_y, W, offsets, out=grad_x, first_expert=first)
            del W
        return grad_x

    def pick(self, experts: Tensor, dtype: torch.dtype) -> Tensor:  # (P,) int64 -> (P, N, K)
        """Expand the matrices of some experts, of which the device alone knows the numbers."""
        shape = (-1, self.rows_of_one, self.in_features)
        if isinstance(self.weight, NF4Weight):
            picked = pick_parts(self.weight, self.num_experts, experts)
            return nf4_dequantize(picked, dtype).view(shape)
        return self.weight.view(shape)[experts].to(dtype)

    def split(self, lora_A: Tensor, lora_B: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Take the values of updates apart by the tensors of checkpoints: name, A and B."""
        assert self.update is not None
        A, B = self.update.of_experts(lora_A, lora_B)
        if self.num_stacked is not None:
            yield self.names[0], A, B
            return
        num_members = len(self.names) // self.num_experts
        for e in range(self.num_experts):
            some = slice(e * num_members, (e + 1) * num_members)
            parts = B[e].split(self.rows[some])
            for name, part in zip(self.names[some], parts, strict=True):
                yield name, A[e], part

    def make_tables(self, dtype: torch.dtype) -> None:
        if isinstance(self.weight, NF4Weight) and self.weight.device.type != "cpu":
            for _, weight in self._parts(self.weight, dtype):
                make_nf4_tables(weight)

    def keep_expanded(self, dtype: torch.dtype) -> None:
        weight = self.weight
        is_packed = isinstance(weight, NF4Weight)
        self.expanded = nf4_dequantize(weight, dtype) if is_packed else weight.to(dtype)

    def expanded_tensors(self) -> Iterator[Tensor]:
        if self.expanded is not None and self.expanded is not self.weight:
            yield self.expanded

    def _expanded(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """Expand the weights, some experts at a time: the first of them, and their matrices, each
        (N, K)."""
        shape = (-1, self.rows_of_one, self.in_features)
        if self.expanded is not None:
            yield 0, self.expanded.view(shape)
        elif isinstance(self.weight, NF4Weight):
            for first, weight in self._parts(self.weight, dtype):
                yield first, nf4_dequantize(weight, dtype).view(shape)
        elif self.weight.dtype == dtype:
            yield 0, self.weight.view(shape)
        else:
            step, rows, _ = self.expanded_shape(dtype)
            for place, part in enumerate(self.weight.split(step * rows)):
                yield place * step, part.to(dtype).view(shape)

    def _parts(self, weight: NF4Weight, dtype: torch.dtype) -> Iterator[tuple[int, NF4Weight]]:
        """View the experts that are expanded together."""
        step, _, _ = self.expanded_shape(dtype)
        num_members = len(weight.rows) // self.num_experts
        for first in range(0, self.num_experts, step):
            yield first, members(weight, slice(first * num_members, (first + step) * num_members))
