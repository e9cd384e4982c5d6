"""The inputs on which a layer's operations are tried: in the interpreter, on a CPU and on a GPU."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from support.nf4_cases import INTERPRETED_DTYPES
from torch import Tensor

from kernels.glu import ACTIVATIONS, Activation
from kernels.rope_tables import RopeTables

CPU = torch.device("cpu")
EPS = 1e-5
# columns that lie behind a matrix's own in its rows
NUM_EXTRA = 16


def generator_of(case: object) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(str(case).encode()))


def nan_in_wider_rows(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make a matrix of the first columns of a wider one, NaN all over."""
    wide = torch.full(
        (*shape[:-1], shape[-1] + NUM_EXTRA), float("nan"), dtype=dtype, device=device
    )
    return wide[..., : shape[-1]]


def part_of_wider_rows(matrix: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy a matrix into the first columns of one that ends in NaN."""
    return nan_in_wider_rows(tuple(matrix.shape), dtype, device).copy_(matrix)


def behind(part: Tensor) -> Tensor:
    """View the columns behind a part of wider rows."""
    shape = (*part.shape[:-1], NUM_EXTRA)
    return part.as_strided(shape, part.stride(), part.storage_offset() + part.shape[-1])


def assert_nan_behind(part: Tensor) -> None:
    """Nothing was written to the columns behind a part of wider rows."""
    assert bool(behind(part).isnan().all())


def assert_kept(tensors: dict[str, Tensor], before: dict[str, Tensor], *but: str) -> None:
    """Nothing was written to any of the tensors, except for some."""
    for name in tensors.keys() - set(but):
        assert torch.equal(tensors[name], before[name]), name


def contiguous(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy results, from wherever they lie."""
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in results.items()
    }


@dataclass(frozen=True)
class NormCase:
    """Rows to normalize, with what is added before, and whether a gradient comes past the norm."""

    num_rows: int
    width: int
    dtype: torch.dtype
    has_residual: bool
    has_grad_r: bool
    # all that is read and written is part of wider rows
    is_strided: bool = False
    # which gradient the result is written over, grad_y or grad_r
    in_place: str = ""
    # where y is written again: over grad_y, or elsewhere; nowhere if empty
    y_place: str = ""
    # what the weights are stored less
    offset: float = 0.0
    is_centred: bool = False

    def __str__(self) -> str:
        words = ["residual"] * self.has_residual + ["grad_r"] * self.has_grad_r
        words += ["strided"] * self.is_strided + [f"over {self.in_place}"] * bool(self.in_place)
        words += [f"y {self.y_place}"] * bool(self.y_place)
        words += [f"offset {self.offset:g}"] * bool(self.offset) + ["centred"] * self.is_centred
        return "-".join((f"M{self.num_rows}-D{self.width}-{str(self.dtype)[6:]}", *words))


def norm_cases(shapes: list[tuple[int, int]], dtypes: tuple[torch.dtype, ...]) -> list[NormCase]:
    """Combine shapes and dtypes with every use of residual, gradient, stride and place."""
    uses = [
        (False, False, False),
        (False, True, True, "grad_y"),
        (True, False, True),
        (True, True, False, "grad_r"),
        (False, False, False, "", "elsewhere"),
        (False, True, True, "grad_y", "elsewhere"),
        (True, False, True, "", "over grad_y"),
        # as a layer does
        (True, True, False, "grad_r", "over grad_y"),
        (True, True, False, "grad_r", "", 1.0),
        (True, True, False, "grad_r", "over grad_y", 1.0),
        # as one behind a sublayer
        (False, False, False, "", "", 1.0),
        (False, False, True, "", "", 0.0, True),
        (True, True, False, "grad_r", "over grad_y", 0.0, True),
    ]
    return [NormCase(*shape, dtype, *use) for dtype in dtypes for shape in shapes for use in uses]


# no row; one of one value; a prime; whole chunks; a row that no program holds
TINY_NORMS = norm_cases([(0, 64), (1, 1), (5, 97), (3, 512), (2, 16400)], INTERPRETED_DTYPES)


def norm_inputs(case: NormCase, device: torch.device = CPU) -> dict[str, Tensor]:
    """Draw rows of very different scale, one of them zero, weights, and gradients.

    The same whether y is written again or not, and whatever the weights are stored less. Rows to be
    centred are about something else than zero.
    """
    generator = generator_of(replace(case, y_place="", offset=0.0))
    shape = (case.num_rows, case.width)
    scale = 2.0 ** torch.arange(case.num_rows).remainder(9).sub(4)
    inputs = {
        "x": torch.randn(shape, generator=generator) * scale[:, None],
        "residual": torch.randn(shape, generator=generator) * scale[:, None],
        "grad_y": torch.randn(shape, generator=generator),
        "grad_r": torch.randn(shape, generator=generator),
    }
    if case.is_centred:
        inputs["x"] += scale[:, None]
    if case.num_rows > 2:
        inputs["x"][2] = 0
        inputs["residual"][2] = 0
    if case.is_strided:
        inputs = {
            name: part_of_wider_rows(tensor, case.dtype, device) for name, tensor in inputs.items()
        }
    weight = 1 - case.offset + torch.randn(case.width, generator=generator) / 4
    inputs |= {"weight": weight}
    return {name: tensor.to(device, case.dtype) for name, tensor in inputs.items()}


def norm_results(
    case: NormCase,
    norm: Callable[..., Any],  # as rms_norm
    norm_backward: Callable[..., Any],  # as rms_norm_backward
    device: torch.device = CPU,
) -> dict[str, Tensor]:
    """Run a normalization forward and back, and see that only what may be is written to."""
    inputs, before = norm_inputs(case, device), norm_inputs(case, device)
    x, weight, grad_y = inputs["x"], inputs["weight"], inputs["grad_y"]
    residual = inputs["residual"] if case.has_residual else None
    grad_r = inputs["grad_r"] if case.has_grad_r else None

    def place() -> Tensor | None:
        shape = (case.num_rows, case.width)
        return nan_in_wider_rows(shape, case.dtype, device) if case.is_strided else None

    out = place()
    kind = (case.offset, case.is_centred)
    y, r, rstd = norm(x, weight, EPS, residual, out, *kind)
    assert (r is x) == (residual is None)
    results = contiguous({"y": y, "r": r, "rstd": rstd})
    grad_out = inputs[case.in_place] if case.in_place else place()
    y_again = {
        "": None,
        "elsewhere": nan_in_wider_rows((case.num_rows, case.width), case.dtype, device),
        "over grad_y": grad_y,
    }[case.y_place]
    grad = norm_backward(grad_y, grad_r, r, rstd, weight, grad_out, y_again, *kind)
    for given, result in ((out, y), (grad_out, grad)):
        assert given is None or result is given
        if case.is_strided:
            assert_nan_behind(result)
    assert_kept(inputs, before, case.in_place, case.y_place.removeprefix("over "))
    if y_again is None:
        return results | contiguous({"grad": grad})
    if case.is_strided or y_again is not grad_y:
        assert_nan_behind(y_again)
    return results | contiguous({"grad": grad, "y_again": y_again})


def norm_results_of_autograd(
    case: NormCase,
    norm: Callable[..., Any],  # as rms_norm_reference
) -> dict[str, Tensor]:
    """Run a normalization forward, and autograd through it back."""
    inputs = norm_inputs(case)
    x = inputs["x"].requires_grad_()
    residual = inputs["residual"] if case.has_residual else None
    y, r, rstd = norm(x, inputs["weight"], EPS, residual, case.offset, case.is_centred)
    outputs, grads = [y], [inputs["grad_y"]]
    if case.has_grad_r:
        outputs.append(r)
        grads.append(inputs["grad_r"])
    (grad,) = torch.autograd.grad(outputs, x, grads)
    return contiguous({"y": y, "r": r, "rstd": rstd, "grad": grad})


@dataclass(frozen=True)
class RopeCase:
    """A qkv buffer whose tokens lie anywhere in the tables."""

    batch: int
    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    # buffers and gradients are parts of wider rows, the gradients of heads that lie apart, and the
    # rows that are written to are those of one token of the batch after the other
    is_strided: bool = False
    rotary_dim: int | None = None  # of the dimensions that turn; None: all
    is_interleaved: bool = False
    scales_queries: bool = False

    def __str__(self) -> str:
        heads = f"H{self.num_heads}+{self.num_kv_heads}x{self.head_dim}"
        words = [f"B{self.batch}-T{self.num_tokens}-{heads}-{str(self.dtype)[6:]}"]
        words += ["strided"] * self.is_strided + [f"r{self.rotary_dim}"] * bool(self.rotary_dim)
        words += ["interleaved"] * self.is_interleaved + ["scaled"] * self.scales_queries
        return "-".join(words)


def rope_cases(
    shapes: list[tuple[int, int, int, int, int]],
    dtypes: tuple[torch.dtype, ...],
    rotary_dim: int | None = None,
    is_interleaved: bool = False,
    scales_queries: bool = False,
) -> list[RopeCase]:
    return [
        RopeCase(*shape, dtype, is_strided, rotary_dim, is_interleaved, scales_queries)
        for dtype in dtypes
        for shape in shapes
        for is_strided in (False, True)
    ]


# no token; one head; pairs that fill no vector; more heads than a tile; than a program
TINY_ROPES = rope_cases(
    [(0, 5, 2, 1, 8), (1, 1, 1, 1, 2), (2, 5, 3, 1, 12), (1, 3, 18, 6, 128), (1, 2, 70, 1, 128)],
    INTERPRETED_DTYPES,
)
# a part of each head turns, and rows of both numbers of pairs
TINY_ROPES += rope_cases([(2, 5, 3, 1, 16)], INTERPRETED_DTYPES, 10)
TINY_ROPES += rope_cases([(2, 5, 3, 1, 12)], INTERPRETED_DTYPES, None, True)
TINY_ROPES += rope_cases([(1, 3, 9, 2, 32)], INTERPRETED_DTYPES, 16, True)
# queries have a factor, in a tile with keys and in one of their own
TINY_ROPES += rope_cases(
    [(2, 5, 3, 1, 12), (1, 3, 18, 6, 128)], INTERPRETED_DTYPES, scales_queries=True
)
NUM_POSITIONS = 37


def rope_inputs(case: RopeCase, device: torch.device = CPU) -> dict[str, Tensor]:
    """Draw a buffer, positions in no order, their tables, and the gradients of the results."""
    generator = generator_of(case)
    num_all = case.num_heads + 2 * case.num_kv_heads
    shape = (case.batch, case.num_tokens)
    num_pairs = (case.rotary_dim or case.head_dim) // 2
    angles = 40 * torch.rand(NUM_POSITIONS, num_pairs, generator=generator)
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
        "query_factor": (1 + torch.rand(NUM_POSITIONS, generator=generator)).to(device),
    }


def tables_of(case: RopeCase, inputs: dict[str, Tensor]) -> RopeTables:
    factor = inputs["query_factor"] if case.scales_queries else None
    return RopeTables(inputs["cos"], inputs["sin"], case.is_interleaved, factor)


def rope_results(
    case: RopeCase,
    rope: Callable[..., Any],  # (qkv, positions, tables, num_heads, num_kv_heads) -> q, k, v
    rope_backward: Callable[..., Any],  # (grad_q, grad_k, grad_v, positions, tables, out)
    device: torch.device = CPU,
) -> dict[str, Tensor]:
    """Run a rotation forward and back, and see that only what may be is written to."""
    inputs, before = rope_inputs(case, device), rope_inputs(case, device)
    tables = (inputs["positions"], tables_of(case, inputs))
    outputs = rope(inputs["qkv"], *tables, case.num_heads, case.num_kv_heads)
    results = contiguous(dict(zip("qkv", outputs, strict=True)))
    out = None
    if case.is_strided:
        shape = (case.num_tokens, case.batch, inputs["qkv"].shape[2])
        out = nan_in_wider_rows(shape, case.dtype, device).transpose(0, 1)
    grad = rope_backward(*(inputs[f"grad_{name}"] for name in "qkv"), *tables, out)
    if out is not None:
        assert grad is out
        assert_nan_behind(out)
    assert_kept(inputs, before, "qkv")
    return results | contiguous({"grad_qkv": grad})


def rope_results_of_autograd(
    case: RopeCase,
    rope: Callable[..., Any],  # (qkv, positions, tables, num_heads, num_kv_heads) -> q, k, v
) -> dict[str, Tensor]:
    """Run a rotation forward, into new tensors, and autograd through it back."""
    inputs = rope_inputs(case)
    qkv = inputs["qkv"].requires_grad_()
    tables = (inputs["positions"], tables_of(case, inputs))
    outputs = rope(qkv, *tables, case.num_heads, case.num_kv_heads)
    (grad,) = torch.autograd.grad(outputs, qkv, [inputs[f"grad_{name}"] for name in "qkv"])
    return contiguous({**dict(zip("qkv", outputs, strict=True)), "grad_qkv": grad})


@dataclass(frozen=True)
class GateCase:
    """A buffer of gates and what they gate."""

    num_rows: int
    width: int
    dtype: torch.dtype
    activation: Activation = "silu"
    # all that is read and written is part of wider rows
    is_strided: bool = False

    def __str__(self) -> str:
        shape = f"{self.activation}-M{self.num_rows}-F{self.width}-{str(self.dtype)[6:]}"
        return shape + "-strided" * self.is_strided


def gate_cases(shapes: list[tuple[int, int]], dtypes: tuple[torch.dtype, ...]) -> list[GateCase]:
    return [
        GateCase(*shape, dtype, activation, is_strided)
        for dtype in dtypes
        for shape in shapes
        for activation in ACTIVATIONS
        for is_strided in (False, True)
    ]


# no row; one value; a prime; a program; more than one
TINY_GATES = gate_cases([(0, 64), (1, 1), (5, 97), (3, 512), (2, 2064)], INTERPRETED_DTYPES)


def gate_inputs(case: GateCase, device: torch.device = CPU) -> dict[str, Tensor]:
    """Draw gates from saturated to saturated, what they gate, and a gradient."""
    generator = generator_of(case)
    gate_up = torch.randn(case.num_rows, 2 * case.width, generator=generator)
    # of ups, too, some exceed 7
    gate_up *= 4
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
    glu: Callable[..., Any],  # (gate_up, activation, out) -> h
    glu_backward: Callable[..., Any],  # (grad_h, gate_up, activation) -> grad_gate_up, h
    device: torch.device = CPU,
) -> dict[str, Tensor]:
    """Run a gating forward and, in place, back, and see that only what may be is written to."""
    inputs, before = gate_inputs(case, device), gate_inputs(case, device)
    grad_h, gate_up = inputs["grad_h"], inputs["gate_up"]
    out = None
    if case.is_strided:
        out = nan_in_wider_rows((case.num_rows, case.width), case.dtype, device)
    h = glu(gate_up, case.activation, out)
    assert out is None or h is out
    assert_kept(inputs, before)
    grad_gate_up, h_again = glu_backward(grad_h, gate_up, case.activation)
    assert grad_gate_up is gate_up
    assert h_again is grad_h
    if case.is_strided:
        for part in (h, grad_gate_up, h_again):
            assert_nan_behind(part)
    return contiguous({"h": h, "grad_gate_up": grad_gate_up, "h_again": h_again})


def gate_results_of_autograd(
    case: GateCase,
    glu: Callable[..., Any],  # (gate_up, activation) -> h
) -> dict[str, Tensor]:
    """Run a gating forward, and autograd through it back."""
    inputs = gate_inputs(case)
    gate_up = inputs["gate_up"].requires_grad_()
    h = glu(gate_up, case.activation)
    (grad,) = torch.autograd.grad(h, gate_up, inputs["grad_h"])
    return contiguous({"h": h, "grad_gate_up": grad, "h_again": h})


def gate_gradient_apart(
    case: GateCase,
    launch_backward: Callable[..., Any],  # (grad_h, gate_up, activation, grad_gate_up, h)
    device: torch.device = CPU,
) -> dict[str, Tensor]:
    """Run a gating back into new matrices."""
    inputs, before = gate_inputs(case, device), gate_inputs(case, device)
    grad_h, gate_up = inputs["grad_h"], inputs["gate_up"]
    h = nan_in_wider_rows((case.num_rows, case.width), case.dtype, device)
    grad_gate_up = nan_in_wider_rows((case.num_rows, 2 * case.width), case.dtype, device)
    launch_backward(grad_h, gate_up, case.activation, grad_gate_up, h)
    assert_kept(inputs, before)
    for part in (h, grad_gate_up):
        assert_nan_behind(part)
    return contiguous({"grad_gate_up": grad_gate_up, "h_again": h})
