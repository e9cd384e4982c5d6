"""The inputs on which a layer's operations are tried: in the interpreter, on a CPU and on a GPU."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from nf4_cases import INTERPRETED_DTYPES
from torch import Tensor

CPU = torch.device("cpu")
EPS = 1e-5
# columns that lie behind a matrix's own in its rows
NUM_EXTRA = 16


def generator_of(case: object) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(str(case).encode()))


def part_of_wider_rows(matrix: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy a matrix into the first columns of one that ends in NaN, and take a leaf over them."""
    wide = torch.full(
        (*matrix.shape[:-1], matrix.shape[-1] + NUM_EXTRA), float("nan"), dtype=dtype, device=device
    )
    part = wide[..., : matrix.shape[-1]]
    part.copy_(matrix)
    return part.detach()


@dataclass(frozen=True)
class NormCase:
    """Rows to normalize, with what is added before and which results have a gradient."""

    num_rows: int
    width: int
    dtype: torch.dtype
    has_residual: bool
    has_grad_r: bool
    is_strided: bool = False

    def __str__(self) -> str:
        words = ["residual"] * self.has_residual + ["grad_r"] * self.has_grad_r
        words += ["strided"] * self.is_strided
        return "-".join((f"M{self.num_rows}-D{self.width}-{str(self.dtype)[6:]}", *words))


def norm_cases(shapes: list[tuple[int, int]], dtypes: tuple[torch.dtype, ...]) -> list[NormCase]:
    """Combine shapes and dtypes with every use of residual, gradient and stride."""
    uses = [(False, False, False), (False, True, True), (True, False, True), (True, True, False)]
    return [NormCase(*shape, dtype, *use) for dtype in dtypes for shape in shapes for use in uses]


# no row; one of one value; a prime; whole chunks; a row that no program holds
TINY_NORMS = norm_cases([(0, 64), (1, 1), (5, 97), (3, 512), (2, 16400)], INTERPRETED_DTYPES)


def norm_inputs(case: NormCase, device: torch.device = CPU) -> dict[str, Tensor]:
    """Draw rows of very different scale, one of them zero, weights, and gradients."""
    generator = generator_of(case)
    shape = (case.num_rows, case.width)
    scale = 2.0 ** torch.arange(case.num_rows).remainder(9).sub(4)
    inputs = {
        "x": torch.randn(shape, generator=generator) * scale[:, None],
        "residual": torch.randn(shape, generator=generator) * scale[:, None],
        "grad_y": torch.randn(shape, generator=generator),
        "grad_r": torch.randn(shape, generator=generator),
    }
    if case.num_rows > 2:
        inputs["x"][2] = 0
        inputs["residual"][2] = 0
    if case.is_strided:
        inputs = {
            name: part_of_wider_rows(tensor, case.dtype, device) for name, tensor in inputs.items()
        }
    weight = 1 + torch.randn(case.width, generator=generator) / 4
    inputs |= {"weight": weight}
    return {name: tensor.to(device, case.dtype) for name, tensor in inputs.items()}


def norm_results(
    case: NormCase,
    norm: Callable[..., Any],  # (x, residual, weight, eps) -> y, r
    device: torch.device = CPU,
) -> dict[str, Tensor]:
    """Run a normalization forward and back."""
    inputs = norm_inputs(case, device)
    x = inputs["x"].requires_grad_()
    leaves = [x]
    residual = None
    if case.has_residual:
        residual = inputs["residual"].requires_grad_()
        leaves.append(residual)
    y, r = norm(x, residual, inputs["weight"], EPS)
    outputs, grads = [y], [inputs["grad_y"]]
    if case.has_grad_r:
        outputs.append(r)
        grads.append(inputs["grad_r"])
    found = torch.autograd.grad(outputs, leaves, grads)
    results = {"y": y.detach(), "r": r.detach()}
    results |= dict(zip(("grad_x", "grad_residual"), found, strict=False))
    return {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in results.items()
    }


@dataclass(frozen=True)
class RopeCase:
    """A qkv buffer whose tokens lie anywhere in the tables."""

    batch: int
    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    # buffer and gradients are parts of wider rows, the gradients of heads that lie apart
    is_strided: bool = False

    def __str__(self) -> str:
        heads = f"H{self.num_heads}+{self.num_kv_heads}x{self.head_dim}"
        shape = f"B{self.batch}-T{self.num_tokens}-{heads}-{str(self.dtype)[6:]}"
        return shape + "-strided" * self.is_strided


def rope_cases(
    shapes: list[tuple[int, int, int, int, int]], dtypes: tuple[torch.dtype, ...]
) -> list[RopeCase]:
    return [
        RopeCase(*shape, dtype, is_strided)
        for dtype in dtypes
        for shape in shapes
        for is_strided in (False, True)
    ]


# no token; one head; pairs that fill no vector; more heads than a tile; than a program
TINY_ROPES = rope_cases(
    [(0, 5, 2, 1, 8), (1, 1, 1, 1, 2), (2, 5, 3, 1, 12), (1, 3, 18, 6, 128), (1, 2, 70, 1, 128)],
    INTERPRETED_DTYPES,
)
NUM_POSITIONS = 37


def rope_inputs(case: RopeCase, device: torch.device = CPU) -> dict[str, Tensor]:
    """Draw a buffer, positions in no order, their tables, and the gradients of the results."""
    generator = generator_of(case)
    num_all = case.num_heads + 2 * case.num_kv_heads
    shape = (case.batch, case.num_tokens)
    angles = 40 * torch.rand(NUM_POSITIONS, case.head_dim // 2, generator=generator)
    drawn = {"qkv": torch.randn(*shape, num_all * case.head_dim, generator=generator)}
    heads = {"q": case.num_heads, "k": case.num_kv_heads, "v": case.num_kv_heads}
    for name, num_heads in heads.items():
        # (B, H, T, head_dim), or that as a view of (B, T, H, head_dim)
        order = (case.num_tokens, num_heads) if case.is_strided else (num_heads, case.num_tokens)
        grad = torch.randn(case.batch, *order, case.head_dim, generator=generator)
        drawn[f"grad_{name}"] = grad
    if case.is_strided:
        drawn = {
            name: part_of_wider_rows(tensor, case.dtype, device) for name, tensor in drawn.items()
        }
        drawn = {n: t.transpose(1, 2) if n.startswith("grad") else t for n, t in drawn.items()}
    drawn = {name: tensor.to(device, case.dtype) for name, tensor in drawn.items()}
    positions = torch.randint(NUM_POSITIONS, shape, generator=generator)
    return drawn | {
        # both kinds of integers
        "positions": positions.to(device, torch.int32 if case.is_strided else torch.int64),
        "cos": angles.cos().to(device),
        "sin": angles.sin().to(device),
    }


def rope_results(
    case: RopeCase,
    rope: Callable[..., Any],  # (qkv, positions, cos, sin, num_heads, num_kv_heads) -> q, k, v
    device: torch.device = CPU,
) -> dict[str, Tensor]:
    """Run a rotation forward and back, over a buffer that may be written to."""
    inputs = rope_inputs(case, device)
    leaf = inputs["qkv"].requires_grad_()
    # the buffer is consumed; an identity keeps its layout where a clone would not
    buffer = _Same.apply(leaf)
    tables = (inputs["positions"], inputs["cos"], inputs["sin"])
    outputs = rope(buffer, *tables, case.num_heads, case.num_kv_heads)
    results = {
        name: output.detach().clone(memory_format=torch.contiguous_format)
        for name, output in zip("qkv", outputs, strict=True)
    }
    grads = [inputs[f"grad_{name}"] for name in "qkv"]
    (results["grad_qkv"],) = torch.autograd.grad(outputs, leaf, grads)
    return results


class _Same(torch.autograd.Function):
    """A result that lies where its input does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0]


@dataclass(frozen=True)
class GateCase:
    """A buffer of gates and what they gate."""

    num_rows: int
    width: int
    dtype: torch.dtype
    is_strided: bool = False
    overwrites: bool = False

    def __str__(self) -> str:
        words = ["strided"] * self.is_strided + ["overwritten"] * self.overwrites
        return "-".join((f"M{self.num_rows}-F{self.width}-{str(self.dtype)[6:]}", *words))


def gate_cases(shapes: list[tuple[int, int]], dtypes: tuple[torch.dtype, ...]) -> list[GateCase]:
    uses = [(False, False), (True, False), (False, True), (True, True)]
    return [GateCase(*shape, dtype, *use) for dtype in dtypes for shape in shapes for use in uses]


# no row; one value; a prime; a program; more than one
TINY_GATES = gate_cases([(0, 64), (1, 1), (5, 97), (3, 512), (2, 2064)], INTERPRETED_DTYPES)


def gate_inputs(case: GateCase, device: torch.device = CPU) -> dict[str, Tensor]:
    """Draw gates from saturated to saturated, what they gate, and a gradient."""
    generator = generator_of(case)
    gate_up = torch.randn(case.num_rows, 2 * case.width, generator=generator)
    gate_up[:, : case.width] *= 4
    flat = gate_up.view(-1)
    # exp overflows, is zero, is one
    extremes = torch.tensor([-200.0, 200.0, 0.0, -89.0, 89.0])[: min(case.width, flat.numel())]
    flat[: extremes.numel()] = extremes
    grad_h = torch.randn(case.num_rows, case.width, generator=generator)
    inputs = {"gate_up": gate_up, "grad_h": grad_h}
    if case.is_strided:
        inputs = {
            name: part_of_wider_rows(tensor, case.dtype, device) for name, tensor in inputs.items()
        }
    return {name: tensor.to(device, case.dtype) for name, tensor in inputs.items()}


def gate_results(
    case: GateCase,
    swiglu: Callable[..., Any],  # (gate_up, overwrites) -> h
    device: torch.device = CPU,
) -> dict[str, Tensor]:
    """Run a gating forward and back."""
    inputs = gate_inputs(case, device)
    leaf = inputs["gate_up"].requires_grad_()
    h = swiglu(_Same.apply(leaf), case.overwrites)
    (grad,) = torch.autograd.grad(h, leaf, inputs["grad_h"])
    results = {"h": h.detach(), "grad_gate_up": grad}
    return {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in results.items()
    }
