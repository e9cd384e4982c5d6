"""The low-rank updates of one projection of all experts, as PEFT's ParamWrapper has them.

    y[r] += s (x[r] A_e^T) B_e^T            offsets[e] <= r < offsets[e + 1]

    lora_A    | A_0 | A_1 | ...             (E rank, K): one below the other
    lora_B    column j E + e is column j of B_e                 (N, rank E)

PEFT adds s B_e A_e to the weights of all experts in every pass; here the rows pass through two
grouped products of a few columns instead. There is no dropout: PEFT knows none for such updates.

    grad_h    = s grad_y B_e
    grad_x   += grad_h A_e
    grad_A_e += grad_h^T x
    grad_B_e += s grad_y^T h

    R sorted rows, E experts, N rows and K columns of an expert

lora_B has the rows of the checkpoint's tensor. Where those of gate and up come in turn (gpt-oss),
they are brought into the group's order when the products are to read them.
"""

import torch
from torch import Tensor, nn

from kernels.expert_gradient import expert_gradient
from kernels.grouped_matmul import grouped_matmul, grouped_matmul_backward_input
from lora.config import UpdateSize


class ExpertUpdate(nn.Module):
    """A low-rank update of each expert, all of one rank."""

    # float32
    lora_A: nn.Parameter  # (E rank, K)
    lora_B: nn.Parameter  # (N, rank E)

    def __init__(
        self,
        shape: tuple[int, int, int],  # E, N, K
        size: UpdateSize,
        device: torch.device,
        generator: torch.Generator,
        num_in_turn: int = 1,
    ) -> None:
        """Begin at zero, with values drawn on the CPU as `LinearGroup.attach` draws them.

        Args:
            num_in_turn: matrices whose rows come in turn in lora_B.
        """
        super().__init__()
        E, N, K = shape
        self.num_experts, self.num_in_turn = E, num_in_turn
        self.rank, self.scaling = size
        has_values = device.type != "meta"
        lora_A = torch.empty(E * self.rank, K, device="cpu" if has_values else device)
        if has_values:
            lora_A.uniform_(-(K**-0.5), K**-0.5, generator=generator)
        self.lora_A = nn.Parameter(lora_A.to(device))
        self.lora_B = nn.Parameter(torch.zeros(N, self.rank * E, device=device))

    def of_experts(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        """Take both apart by expert, in the group's order of rows: (E, rank, K), (E, N, rank)."""
        B = self._in_turns(lora_B).permute(3, 1, 0, 2).flatten(1, 2)
        return lora_A.view(self.num_experts, self.rank, -1), B

    def _in_turns(self, lora_B: Tensor) -> Tensor:  # (N / turns, turns, rank, E)
        return lora_B.view(-1, self.num_in_turn, self.rank, self.num_experts)

    def matrices(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # (E, rank, K), (E, N, rank)
        """Write out A_e and s B_e as the products read them."""
        A, B = self.of_experts(self.lora_A.detach(), self.lora_B.detach())
        return A.to(dtype), (self.scaling * B).to(dtype).contiguous()

    def forward(self, x: Tensor, offsets: Tensor, y: Tensor) -> Tensor:  # (R, rank)
        """Add the updates to y, (R, N), and return h = x A_e^T."""
        A, sB = self.matrices(x.dtype)
        h = grouped_matmul(x, A, offsets)
        y += grouped_matmul(h, sB, offsets)
        return h

    def pick(self, x: Tensor, experts: Tensor) -> Tensor:  # (P, K) and (P,) int64 -> (P, N)
        """Compute the updates' part of rows whose experts the device alone knows."""
        matrices = self.of_experts(self.lora_A.detach(), self.lora_B.detach())
        A, B = (matrix[experts].to(x.dtype) for matrix in matrices)
        return self.scaling * torch.bmm(B, torch.bmm(A, x[:, :, None]))[:, :, 0]

    def backward(self, grad_y: Tensor, offsets: Tensor, grad_x: Tensor) -> Tensor:  # (R, rank)
        """Add to x's gradient, (R, K), and return that of h."""
        A, sB = self.matrices(grad_y.dtype)
        grad_h = grouped_matmul_backward_input(grad_y, sB, offsets)
        grad_x += grouped_matmul_backward_input(grad_h, A, offsets)
        return grad_h

    def accumulate_grad_B(self, grad_y: Tensor, h: Tensor, offsets: Tensor) -> None:
        """Add s grad_y^T h to the gradient of each B_e."""
        assert self.lora_B.grad is not None
        grad_B, h = self._in_turns(self.lora_B.grad), self.scaling * h
        for turn, own in enumerate(grad_y.chunk(self.num_in_turn, dim=1)):
            expert_gradient(h, own, offsets, grad_B[:, turn].permute(2, 1, 0))

    def accumulate_grad_A(self, grad_h: Tensor, x: Tensor, offsets: Tensor) -> None:
        """Add grad_h^T x to the gradient of each A_e."""
        assert self.lora_A.grad is not None
        grad_A = self.lora_A.grad.view(self.num_experts, self.rank, -1)
        expert_gradient(grad_h, x, offsets, grad_A)
