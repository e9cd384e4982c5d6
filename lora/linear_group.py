"""Projections that share one input, as one frozen linear layer with a low-rank update for each.

    q_proj | k_proj | v_proj        gate_proj | up_proj        o_proj        down_proj

The members' weights lie row by row in one buffer, so one dequantization and one product serve them
all; checkpoint and adapter files still see the members by name. PEFT instead wraps each projection,
dequantizes each by itself and computes each update from its own copy of the input's gradient. Here
the members share the input's dropout mask too, which is one draw where PEFT makes one per
projection.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.nf4_matmul import nf4_matmul, nf4_matmul_transposed
from kernels.nf4_quantize import nf4_quantize_member, nf4_quantize_member_unchecked
from lora.config import LoRAConfig
from nf4.weight import NF4Weight, empty_weight


class _Update(NamedTuple):
    """Where one member's update lives: its rows of y, of the stacked A, of the stacked B."""

    y: slice
    A: slice
    B: slice


def _matmul_float32(a: Tensor, b: Tensor) -> Tensor:
    """Multiply 16-bit matrices into a float32 result, rounded nowhere in between."""
    if a.dtype == torch.float32 or a.device.type == "cpu":
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


class _LoRALinear(torch.autograd.Function):
    """A frozen linear layer with low-rank updates; z is x after dropout, or x itself.

        h_i      = z A_i^T                          for each member i with an update
        y_i      = x W_i^T + b_i + s h_i B_i^T

        grad_h_i = s grad_y_i B_i
        grad_B_i = s grad_y_i^T h_i
        grad_A_i = grad_h_i^T z
        grad_z   = sum_i grad_h_i A_i
        grad_x   = grad_y W                         over all members, with an update or not

    W and b are frozen; W is dequantized again, not saved. Without dropout grad_z is added into
    grad_x. grad_A and grad_B are float32, accumulated in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (M, K) compute dtype
        z: Tensor | None,  # (M, K), or None where there is no dropout
        lora_A: Tensor,  # (num_updates * R, K) float32
        lora_B: Tensor,  # (sum of the targets' rows, R) float32
        group: "LinearGroup",
    ) -> Tensor:  # (M, N) compute dtype
        A = lora_A.to(x.dtype)
        B = lora_B.to(x.dtype)
        h = (x if z is None else z) @ A.T
        y = group.multiply_base(x)
        for update in group.updates:
            y[:, update.y].addmm_(h[:, update.A], B[update.B].T, alpha=group.scaling)
        ctx.save_for_backward(x if z is None else z, h, lora_A, lora_B)
        ctx.group = group
        ctx.has_dropout = z is not None
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grad_outputs
        z, h, lora_A, lora_B = ctx.saved_tensors
        group: LinearGroup = ctx.group
        needs_x, needs_z, needs_A, needs_B, _ = ctx.needs_input_grad
        A = lora_A.to(grad_y.dtype)
        B = lora_B.to(grad_y.dtype)
        grad_h = torch.empty_like(h)
        grad_B = torch.empty_like(lora_B) if needs_B else None
        for update in group.updates:
            # beta=0 overwrites; the scaling is applied before the one rounding
            grad_h[:, update.A].addmm_(
                grad_y[:, update.y], B[update.B], beta=0, alpha=group.scaling
            )
            if grad_B is not None:
                torch.mul(
                    _matmul_float32(grad_y[:, update.y].T, h[:, update.A]),
                    group.scaling,
                    out=grad_B[update.B],
                )
        grad_A = _matmul_float32(grad_h.T, z) if needs_A else None
        grad_z = grad_h @ A if needs_z else None
        grad_x = group.multiply_base_transposed(grad_y) if needs_x else None
        if grad_x is not None and not ctx.has_dropout:
            grad_x.addmm_(grad_h, A)
        return grad_x, grad_z, grad_A, grad_B, None


class _FrozenLinear(torch.autograd.Function):
    """A frozen linear layer: y = x W^T + b, grad_x = grad_y W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: "LinearGroup") -> Tensor:
        ctx.group = group
        return group.multiply_base(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None]:
        (grad_y,) = grad_outputs
        needs_x, _ = ctx.needs_input_grad
        return ctx.group.multiply_base_transposed(grad_y) if needs_x else None, None


class LinearGroup(nn.Module):
    """Frozen projections of one input, in NF4 or in the checkpoint's dtype, with optional low-rank
    updates.

        y = [x W_0^T + b_0 + s z A_0^T B_0^T | x W_1^T + b_1 + ... ]

    LoRA (Hu et al. 2021) section 4.1; QLoRA section 3, equation 5.

    Attributes:
        updates: where each target's update lies in the stacked lora_A and lora_B, in the members'
            order.
        targets: the members with an update.
    """

    weight: NF4Weight | Tensor  # (sum of rows, in_features)
    bias: Tensor | None  # (sum of rows,)
    # float32, the targets' matrices one below the other
    lora_A: nn.Parameter | None  # (num_updates * r, in_features)
    lora_B: nn.Parameter | None  # (sum of the targets' rows, r)

    def __init__(
        self, names: tuple[str, ...], rows: tuple[int, ...], in_features: int, has_bias: bool
    ) -> None:
        super().__init__()
        self.names = names
        self.rows = rows
        self.in_features = in_features
        self.has_bias = has_bias
        self.updates: list[_Update] = []
        self.targets: tuple[str, ...] = ()
        self.scaling = 0.0
        self.dropout = 0.0
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)

    def _row_slices(self) -> list[slice]:
        starts = [sum(self.rows[:i]) for i in range(len(self.rows))]
        return [slice(start, start + rows) for start, rows in zip(starts, self.rows, strict=True)]

    def allocate(
        self,
        device: torch.device,
        weight_dtype: torch.dtype | None,
        bias_dtype: torch.dtype | None,
        quantization: tuple[int, bool] | None,
    ) -> None:
        """Allocate what `load` fills: the frozen weight and, where there is one, the bias.

        Args:
            weight_dtype: of a weight that is not quantized.
            bias_dtype: of the bias, which is never quantized.
            quantization: (block_size, double_quant) of NF4, or None for a weight as stored.
        """
        if quantization is None:
            self.weight = torch.empty(
                sum(self.rows), self.in_features, dtype=weight_dtype, device=device
            )
        else:
            self.weight = empty_weight(self.rows, self.in_features, *quantization, device)
        self.bias = (
            torch.empty(sum(self.rows), dtype=bias_dtype, device=device) if self.has_bias else None
        )

    def home(self, name: str) -> Tensor | None:
        """Find the rows that hold a member's weight or bias ("q_proj.weight") as the checkpoint has
        it; None for a weight that is quantized."""
        member_name, kind = name.rsplit(".", 1)
        if kind == "weight" and isinstance(self.weight, NF4Weight):
            return None
        buffer = self.bias if kind == "bias" else self.weight
        assert isinstance(buffer, Tensor)
        return buffer[self._row_slices()[self.names.index(member_name)]]

    def quantize(self, name: str, tensor: Tensor, checkpoint_name: str) -> Tensor:
        """Quantize a member's weight into the buffers, without waiting for the device.

        Returns:
            The scales, float32: one that is not finite tells of a weight that is not.
        """
        assert isinstance(self.weight, NF4Weight)
        index = self.names.index(name.rsplit(".", 1)[0])
        return nf4_quantize_member_unchecked(self.weight, index, tensor, checkpoint_name)

    def load(self, name: str, tensor: Tensor, checkpoint_name: str) -> None:
        """Take a member's weight or bias ("q_proj.weight") into the buffers, quantizing on arrival.

        Raises:
            ValueError: the tensor holds a NaN or an infinity; the message names `checkpoint_name`.
        """
        index = self.names.index(name.rsplit(".", 1)[0])
        home = self.home(name)
        if home is None:
            assert isinstance(self.weight, NF4Weight)
            nf4_quantize_member(self.weight, index, tensor, checkpoint_name)
            return
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{checkpoint_name} must hold finite values only: got NaN or infinity")
        # copy_ would broadcast and round
        assert (home.shape, home.dtype) == (tensor.shape, tensor.dtype)
        home.copy_(tensor)

    def attach(self, config: LoRAConfig, device: torch.device, generator: torch.Generator) -> None:
        """Give every member among the targets an update that starts at zero.

        A ~ U(-1/sqrt(in_features), 1/sqrt(in_features)), B = 0, as PEFT draws them. Drawn on the
        CPU, so a seed gives the same adapter on every device.
        """
        assert not self.updates, "a group takes one adapter"
        self.targets = tuple(name for name in self.names if name in config.target_modules)
        if not self.targets:
            return
        bound = self.in_features**-0.5
        self.scaling, self.dropout = config.scaling, config.lora_dropout
        parts_A = []
        num_rows = 0
        for name, y in zip(self.names, self._row_slices(), strict=True):
            if name in self.targets:
                first = len(parts_A) * config.r
                rows = y.stop - y.start
                self.updates.append(
                    _Update(y, slice(first, first + config.r), slice(num_rows, num_rows + rows))
                )
                part = torch.empty(config.r, self.in_features)
                parts_A.append(part.uniform_(-bound, bound, generator=generator))
                num_rows += rows
        self.lora_A = nn.Parameter(torch.cat(parts_A).to(device))
        self.lora_B = nn.Parameter(torch.zeros(num_rows, config.r, device=device))

    def adapter_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The updates by PEFT's names ("q_proj.lora_A.weight"), as views of the parameters."""
        if self.lora_A is None or self.lora_B is None:
            return
        for name, update in zip(self.targets, self.updates, strict=True):
            yield f"{name}.lora_A.weight", self.lora_A.detach()[update.A]
            yield f"{name}.lora_B.weight", self.lora_B.detach()[update.B]

    @property
    def num_frozen(self) -> int:
        """Frozen weights and biases, counted as numbers, not as bytes."""
        return sum(self.rows) * (self.in_features + self.has_bias)

    def multiply_base(self, x: Tensor) -> Tensor:  # (M, in_features) -> (M, sum of rows)
        """Compute x W^T + b, without gradient."""
        weight = self.weight
        y = nf4_matmul(x, weight) if isinstance(weight, NF4Weight) else x @ weight.to(x.dtype).T
        return y if self.bias is None else y.add_(self.bias.to(y.dtype))

    def multiply_base_transposed(
        self, grad_y: Tensor
    ) -> Tensor:  # (M, sum of rows) -> (M, in_features)
        """Compute grad_y W, without gradient."""
        grad_y = grad_y.contiguous()
        if isinstance(self.weight, NF4Weight):
            return nf4_matmul_transposed(grad_y, self.weight)
        return grad_y @ self.weight.to(grad_y.dtype)

    def multiply(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., sum of rows)
        """Apply all members to x; the result is a buffer that nothing else holds."""
        flat = x.reshape(-1, self.in_features)
        if self.updates:
            drops = self.training and self.dropout > 0
            z = F.dropout(flat, self.dropout) if drops else None
            y = _LoRALinear.apply(flat, z, self.lora_A, self.lora_B, self)
        else:
            y = _FrozenLinear.apply(flat, self)
        return y.view(*x.shape[:-1], -1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # (..., in_features) -> (..., rows[i]) each
        """Apply all members to x; the results are views of one buffer."""
        return self.multiply(x).split(self.rows, dim=-1)
