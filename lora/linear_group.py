"""Projections that share one input, as one frozen linear layer with a low-rank update for each.

    q_proj | k_proj | v_proj        gate_proj | up_proj        o_proj        down_proj

The members' weights lie row by row in one buffer, so one dequantization and one product serve them
all; checkpoint and adapter files still see the members by name. The updates ride in the same
product, because the buffers have room for them (a tail of T columns):

    forward     y      = [x | h] [W | s B]^T              h      = z A^T
    backward    grad_x = [grad_y | grad_h] [W; A]         grad_h = grad_y s B

                grad_A += grad_h^T z
                grad_B += s grad_y^T h

where z is x after dropout, or x itself. Whoever produces x or grad_y writes it into a buffer with
that room, and there is no autograd: the layers write their backward pass out. PEFT instead wraps
each projection, dequantizes each by itself, adds each update in a pass of its own and computes it
from its own copy of the input's gradient. Here the members share the input's dropout mask too,
which is one draw where PEFT makes one per projection.

Members may have updates of different ranks. Then each has room for the largest, R: rows of A and
columns of B beyond a member's own rank are zero, and so are their gradients, since each is a
product with the other. They stay zero in training, and no file sees them.

The equations hold for a weight in 16 bits. In 8 bits the updates keep 16 and join the same sums:
`lora/expansion.py` has both forms.
"""

from collections.abc import Iterator, Mapping
from typing import TypeGuard

import torch
from torch import Tensor, nn

from kernels.dropout import dropout, dropout_add_
from kernels.fp8 import E4M3
from kernels.lora_extension import Update, make_lora_extension_tables, write_updates
from kernels.lora_gradient import lora_gradient, make_lora_gradient_tables
from kernels.lora_gradient_products import add_product
from kernels.lora_input import extend_input
from kernels.nf4_dequantize import nf4_dequantize
from kernels.nf4_matmul import (
    MOST_DECODED_ROWS,
    make_nf4_matmul_tables,
    matmul_path,
    nf4_matmul,
)
from kernels.nf4_to_fp8 import fp8_scale, members_obstacle
from kernels.nf4_to_int8 import int8_scales
from kernels.rotation import INT8
from kernels.rows_8bit import empty_8bit_rows
from lora.config import UpdateSize
from lora.expansion import EightBits, Expansion, SixteenBits
from lora.frozen_group import FrozenGroup
from lora.rows import Rows
from nf4.weight import NF4Weight

# of the tails' columns: rows stay aligned for the widest access, and their strides are no powers of
# two, on which cuBLAS is slower: 3 % of an 8B step
TAIL_MULTIPLE = 64


def tail_columns(num_ranks: int) -> int:
    """Count the columns of a tail that has room for so many ranks."""
    return num_ranks + -num_ranks % TAIL_MULTIPLE


class LinearGroup(FrozenGroup):
    """Frozen projections of one input, in NF4 or in the checkpoint's dtype, with optional low-rank
    updates.

        y = [x W_0^T + b_0 + s z A_0^T B_0^T | x W_1^T + b_1 + ... ]

    LoRA (Hu et al. 2021) section 4.1; QLoRA section 3, equation 5.

    Attributes:
        updates: where each target's update lies in the stacked lora_A and lora_B, in the members'
            order.
        sizes: rank and scaling of the members with an update, in the members' order.
    """

    # float32, the targets' matrices one below the other
    lora_A: nn.Parameter | None  # (num_updates * R, in_features)
    lora_B: nn.Parameter | None  # (sum of the targets' rows, R)
    # of the weight in E4M3, () float32; None: the base products are in the dtype of the passes
    fp8_scale: Tensor | None
    # of the weight's rows in INT8, (N,) float32, where the forward product is of those
    int8_scales: Tensor | None
    # of the forward product: E4M3 or INT8; None: it is in the dtype of the passes
    forward_format: torch.dtype | None
    # for the forward and the backward pass
    expanded: tuple[Expansion, Expansion] | None

    def __init__(
        self, names: tuple[str, ...], rows: tuple[int, ...], in_features: int, has_bias: bool
    ) -> None:
        super().__init__(names, rows, in_features, has_bias)
        self.updates: tuple[Update, ...] = ()
        self.sizes: dict[str, UpdateSize] = {}
        self.dropout = 0.0
        self.site = 0
        self.fp8_scale = self.int8_scales = self.forward_format = None
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)

    def attach(
        self,
        sizes: Mapping[str, UpdateSize],
        dropout: float,
        device: torch.device,
        generator: torch.Generator,
        site: int,
    ) -> None:
        """Give every member that has a size an update that starts at zero.

        A ~ U(-1/sqrt(in_features), 1/sqrt(in_features)), B = 0, as PEFT draws them. Drawn on the
        CPU, so a seed gives the same adapter on every device.

        Args:
            site: tells this group's dropout masks from those of others.
        """
        assert not self.updates, "a group takes one adapter"
        self.sizes = {name: sizes[name] for name in self.names if name in sizes}
        if not self.sizes:
            return
        bound = self.in_features**-0.5
        # on the meta device there are no values to draw
        has_values = device.type != "meta"
        self.dropout, self.site = dropout, site
        room = max(size.rank for size in self.sizes.values())
        drawn_on = torch.device("cpu") if has_values else device
        lora_A = torch.zeros(room * len(self.sizes), self.in_features, device=drawn_on)
        updates = []
        num_rows = 0
        for name, y in zip(self.names, self.row_slices(), strict=True):
            if name in self.sizes:
                rank, scaling = self.sizes[name]
                A = slice(len(updates) * room, (len(updates) + 1) * room)
                rows = y.stop - y.start
                updates.append(Update(y, A, slice(num_rows, num_rows + rows), scaling))
                if has_values:
                    lora_A[A][:rank].uniform_(-bound, bound, generator=generator)
                num_rows += rows
        self.updates = tuple(updates)
        self.lora_A = nn.Parameter(lora_A.to(device))
        self.lora_B = nn.Parameter(torch.zeros(num_rows, room, device=device))

    def make_tables(self, dtype: torch.dtype) -> None:
        device = self.weight.device
        if device.type == "cpu":
            return
        if isinstance(self.weight, NF4Weight):
            make_nf4_matmul_tables(self.weight, dtype)
        if self.updates:
            make_lora_extension_tables(self.updates, device)
            make_lora_gradient_tables(self.updates, device)

    def adapter_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The updates by PEFT's names ("q_proj.lora_A.weight"), as views of the parameters."""
        if self.lora_A is None or self.lora_B is None:
            return
        for (name, size), update in zip(self.sizes.items(), self.updates, strict=True):
            yield f"{name}.lora_A.weight", self.lora_A.detach()[update.A][: size.rank]
            yield f"{name}.lora_B.weight", self.lora_B.detach()[update.B][:, : size.rank]

    @property
    def tail(self) -> int:
        """The columns that x and grad_y have behind their own, for h and its gradient."""
        return tail_columns(0 if self.lora_A is None else self.lora_A.shape[0])

    def empty_input(self, num_rows: int, like: Tensor) -> Rows:  # (num_rows, K + T)
        """Allocate buffers for x and its tail, on a tensor's device and in its dtype."""
        ext, K = new_rows(like, num_rows, self.in_features + self.tail), self.in_features
        format = self.product_format(is_backward=False)
        return Rows(ext, format and empty_8bit_rows((num_rows, K), format, ext.device))

    def extended(self, x: Tensor) -> Tensor:  # (M, K) -> (M, K + T)
        """Put x into a buffer with a tail; x itself where there is none."""
        if not self.tail:
            return x
        x_ext = new_rows(x, x.shape[0], self.in_features + self.tail)
        x_ext[:, : self.in_features] = x
        return x_ext

    def empty_output(self, num_rows: int, like: Tensor) -> Tensor:  # (num_rows, N + T)
        """Allocate a buffer for y or its gradient and the tail."""
        return new_rows(like, num_rows, self.num_rows + self.tail)

    def multiply_in_8_bits(self, forward: torch.dtype | None) -> None:
        """Let the base products be of 8 bits, where the weight is in NF4 and its members' sizes
        allow that; after loading, before the first pass. The backward pass's are in E4M3.

        Args:
            forward: E4M3 or INT8 for the forward pass's product; None leaves it as it is.
        """
        weight = self.weight
        if isinstance(weight, NF4Weight) and not members_obstacle(weight.rows, self.in_features):
            self.fp8_scale, self.forward_format = fp8_scale(weight), forward
            self.int8_scales = int8_scales(weight) if forward == INT8 else None

    def frozen_tensors(self) -> Iterator[Tensor]:
        yield from super().frozen_tensors()
        yield from (scale for scale in (self.fp8_scale, self.int8_scales) if scale is not None)

    def product_format(self, is_backward: bool) -> torch.dtype | None:
        """Tell the 8-bit format of a pass's base product: E4M3, INT8, or None if it is in 16."""
        if self.fp8_scale is None:
            return None
        return E4M3 if is_backward else self.forward_format

    def keep_expanded(self, dtype: torch.dtype) -> None:
        """Expand the weight once for all passes, which then write the updates beside it alone."""
        has_forward = self.forward_format is not None
        back = self._expand_weight(dtype, True).kept(has_forward)
        is_one = self.fp8_scale is None or has_forward
        self.expanded = (back if is_one else self._expand_weight(dtype, False), back)

    def expanded_tensors(self) -> Iterator[Tensor]:
        expansions = [] if self.expanded is None else self.expanded
        tensors = {id(t): t for expansion in expansions for t in expansion.tensors()}
        yield from (tensor for tensor in tensors.values() if tensor is not self.weight)

    def expand(self, dtype: torch.dtype, is_backward: bool = False) -> Expansion:
        """Write out what a pass's product reads: the weight, and the updates as they are now."""
        if self.expanded is None:
            expansion = self._expand_weight(dtype, is_backward)
        else:
            expansion = self.expanded[is_backward]
        if self.lora_A is not None and self.lora_B is not None:
            A, sB = expansion.A, expansion.sB
            write_updates(A, sB, self.lora_A, self.lora_B, self.updates)
        return expansion

    def _expand_weight(self, dtype: torch.dtype, is_backward: bool) -> Expansion:
        """Write out the weight, and leave room for the updates."""
        N, K, tail, weight = self.num_rows, self.in_features, self.tail, self.weight
        if self.product_format(is_backward):
            assert isinstance(weight, NF4Weight)
            assert self.fp8_scale is not None
            A, sB = (
                torch.empty(shape, dtype=dtype, device=weight.device)
                for shape in ((tail, K), (N, tail))
            )
            return EightBits(weight, self.fp8_scale, self.int8_scales, A, sB)
        if not self.updates:
            is_packed = isinstance(weight, NF4Weight)
            W = nf4_dequantize(weight, dtype) if is_packed else weight.to(dtype)
            return SixteenBits(W, N, K)
        W_ext = torch.empty(N + tail, K + tail, dtype=dtype, device=weight.device)
        if isinstance(weight, NF4Weight):
            nf4_dequantize(weight, dtype, out=W_ext[:N, :K])
        else:
            W_ext[:N, :K] = weight
        return SixteenBits(W_ext, N, K)

    def forward(
        self,
        rows: Rows,  # (M, K + T), x in the first K columns
        seed: Tensor | None = None,  # (1,) int64, of the dropout; None: there is none
        out: Tensor | None = None,  # (M, N), each row contiguous
    ) -> Tensor:  # (M, N)
        """Apply all members to x, and leave h = z A^T in the tail.

        Few rows are multiplied by the packed weight.
        """
        K = self.in_features
        x, h = rows.ext[:, :K], rows.ext[:, K:]
        if self._decodes_inside(x, seed):
            return self._multiply_packed(x, h, out)
        expansion = self.expand(x.dtype)
        if self.updates:
            torch.mm(self.dropped(x, seed), expansion.A.T, out=h)
        return expansion.multiply(rows, self._bias(x.dtype), out)

    def forward_from(
        self,
        x: Tensor,  # (M, K)
        seed: Tensor | None = None,  # as `forward` takes it
    ) -> tuple[Tensor, Tensor]:  # (M, N) and (M, K + T)
        """Apply all members to an x that lies elsewhere, and return it with h behind it."""
        if self.lora_A is None or self._drops(seed) or self._decodes_inside(x, seed):
            rows = Rows(self.extended(x))
            return self.forward(rows, seed), rows.ext
        rows = Rows(new_rows(x, x.shape[0], self.in_features + self.tail))
        expansion = self.expand(x.dtype)
        extend_input(x, expansion.A[: self.lora_A.shape[0]], rows.ext)
        return expansion.multiply(rows, self._bias(x.dtype), None), rows.ext

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.bias is None else self.bias.to(dtype)

    def _drops(self, seed: Tensor | None) -> TypeGuard[Tensor]:
        return seed is not None and self.dropout > 0

    def _decodes_inside(self, x: Tensor, seed: Tensor | None) -> bool:
        """Tell whether x has so few rows that the packed weight is faster than the expanded one."""
        if not isinstance(self.weight, NF4Weight) or x.device.type == "cpu" or self._drops(seed):
            return False
        num_rows = x.shape[0]
        return (
            num_rows <= MOST_DECODED_ROWS
            and matmul_path(num_rows, self.weight, x.dtype).name != "expand"
        )

    def _multiply_packed(self, x: Tensor, h: Tensor, out: Tensor | None) -> Tensor:
        assert isinstance(self.weight, NF4Weight)
        y = nf4_matmul(x, self.weight)
        if self.lora_A is not None and self.lora_B is not None:
            num_ranks = self.lora_A.shape[0]
            torch.mm(x, self.lora_A.to(x.dtype).T, out=h[:, :num_ranks])
            B = self.lora_B.to(x.dtype)
            for update in self.updates:
                y[:, update.y].addmm_(h[:, update.A], B[update.B].T, alpha=update.scaling)
        if self.bias is not None:
            y += self.bias.to(y.dtype)
        return y if out is None else out.copy_(y)

    def dropped(self, x: Tensor, seed: Tensor | None) -> Tensor:  # (M, K)
        """z: x after dropout, or x itself."""
        return dropout(x, seed, self.site, self.dropout) if self._drops(seed) else x

    def backward(
        self,
        grad_ext: Tensor,  # (M, N + T), grad_y in the first N columns
        h: Tensor,  # (M, T), what `forward` left in the tail
        seed: Tensor | None = None,
        needs_grad_x: bool = True,
    ) -> Tensor | None:  # (M, K), or None if it is not needed
        """Compute x's gradient, add B's to `lora_B.grad`, and leave grad_h in the tail.

        A's needs z, which may have to be computed again: `accumulate_grad_A`.
        """
        N = self.num_rows
        if not needs_grad_x and not self.updates:
            return None
        # the updates are written again, since a forward pass of few rows has not written them
        expansion = self.expand(grad_ext.dtype, is_backward=True)
        grad_y, grad_h = grad_ext[:, :N], grad_ext[:, N:]
        if self.updates:
            assert self.lora_B is not None
            assert self.lora_B.grad is not None
            lora_gradient(grad_y, h, expansion.sB, grad_h, self.lora_B.grad, self.updates)
        if not needs_grad_x:
            return None
        if not self._drops(seed):
            return expansion.multiply_back(grad_ext, bool(self.updates))
        grad_x = expansion.multiply_back(grad_ext, False)
        return dropout_add_(grad_x, grad_h @ expansion.A, seed, self.site, self.dropout)

    def accumulate_grad_A(
        self,
        grad_ext: Tensor,  # (M, N + T), after `backward`
        x: Tensor,  # (M, K)
        seed: Tensor | None = None,
    ) -> None:
        """Add grad_h^T z to `lora_A.grad`."""
        if self.lora_A is None:
            return
        assert self.lora_A.grad is not None
        N, num_ranks = self.num_rows, self.lora_A.shape[0]
        grad_h = grad_ext[:, N : N + num_ranks]
        add_product(self.lora_A.grad, grad_h.T, self.dropped(x, seed))


def new_rows(like: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """Allocate rows, of which the tails are written last.

    On a CPU they begin as zeros: oneDNN's products in 16 bits read a little beyond the columns of
    their rows and multiply that by zero, which does not make a number of a NaN.
    """
    make = like.new_zeros if like.device.type == "cpu" else like.new_empty
    return make(num_rows, num_columns)
