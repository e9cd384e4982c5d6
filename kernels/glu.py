"""Gate a layer's inner activations, forward and in-place backward on the GPU.

    h         = gate s up                          s = 1 / (1 + exp(-z)), a gated linear unit
    grad_gate = grad_h up s (1 + gate (1 - s) z')
    grad_up   = grad_h gate s

    silu           z = gate                                         z' = 1
    gelu_tanh      z = 2 sqrt(2 / pi) (gate + 0.044715 gate^3)      z' = dz / dgate
    clamped_swish  z = 1.702 gate                                   z' = 1.702

    gate_up        | gate 0 .. F-1      | up 0 .. F-1      |     a row, as the linear group
    grad_gate_up   | grad_gate 0 .. F-1 | grad_up 0 .. F-1 |     writes it and wants it back
    h              | h 0 .. F-1         |

The backward pass needs gate_up and grad_h alone. A thread reads a value and writes its gradient, so
the gradient is written over gate_up, and h, which the gradient of a low-rank update on h needs
again, over grad_h. With M rows and S bytes a value:

    forward     3 M F S       two read, one written
    backward    6 M F S       three read, three written: h again

and about 10 operations a value forward, 20 backward, two of them on the special function unit:
memory bandwidth is the limit. The arithmetic is float32, each result rounded once, where torch
rounds gate s before it is multiplied.

gelu_tanh is gate (1 + tanh(z / 2)) / 2, an approximation of GELU (Hendrycks and Gimpel 2016) that
Gemma was trained with. tanh and the logistic function are the same curve, so both activations take
the same path through the kernel.

clamped_swish is gpt-oss's: h = min(gate, 7) s (clamp(up, -7, 7) + 1). The gradient of what exceeds
7 is zero. Swish is Ramachandran et al. 2017; with 1.702 it is Hendrycks and Gimpel's other
approximation of GELU.

Autograd records neither function: the layer writes its backward pass out. A matrix may be the first
columns of wider rows; accesses stay 16 bytes wide where its row stride, and F, is a multiple of 16
values.

SwiGLU and GEGLU: Shazeer 2020, "GLU Variants Improve Transformer", section 2.
"""

# triton's annotations know neither static_range nor tuples of tensors
# pyright: reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.checks import (
    check_dtype,
    check_not_recorded,
    check_one_device,
    check_rows_are_apart,
    check_rows_are_contiguous,
)
from kernels.language import tl, triton
from kernels.launch import cdiv, launch

Activation = Literal["silu", "gelu_tanh", "clamped_swish"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
# of gelu_tanh's z, the factors of gate and of gate^3
LINEAR = tl.constexpr(2 * math.sqrt(2 / math.pi))
CUBIC = tl.constexpr(2 * math.sqrt(2 / math.pi) * 0.044715)
# of clamped_swish, the factor of gate in z, and what neither gate nor up exceeds
STEEPNESS, LIMIT = tl.constexpr(1.702), tl.constexpr(7.0)

NUM_WARPS = 4
# the widest access of a thread
VECTOR_BYTES = 16
# chunks of a program; all their loads are under way before the first chunk is worked on
CHUNKS = 2


def glu_reference(gate_up: Tensor, activation: Activation) -> Tensor:  # (..., 2 F) -> (..., F)
    """Gate in the tensor's dtype, rounding the activation and the product."""
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == "silu":
        return F.silu(gate) * up
    if activation == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    gate = gate.clamp(max=LIMIT.value)
    return gate * torch.sigmoid(STEEPNESS.value * gate) * (_clamped(up) + 1)


def _clamped(x: Tensor) -> Tensor:
    return x.clamp(-LIMIT.value, LIMIT.value)


def glu_backward_reference(
    grad_h: Tensor,  # (M, F)
    gate_up: Tensor,  # (M, 2 F)
    activation: Activation,
) -> tuple[Tensor, Tensor]:  # grad_gate_up (M, 2 F), h (M, F)
    """Compute the gradient and the forward result in float32, each rounded once."""
    gate, up = gate_up.float().chunk(2, dim=1)
    # of which of them the gradient is not zero
    is_inside = (torch.ones_like(gate), torch.ones_like(up))
    if activation == "silu":
        sigmoid = torch.sigmoid(gate)
        slope = 1 + gate * (1 - sigmoid)
    elif activation == "clamped_swish":
        is_inside = (gate <= LIMIT.value, up.abs() <= LIMIT.value)
        gate, up = gate.clamp(max=LIMIT.value), _clamped(up) + 1
        sigmoid = torch.sigmoid(STEEPNESS.value * gate)
        slope = 1 + STEEPNESS.value * gate * (1 - sigmoid)
    else:
        cubic = CUBIC.value * gate * gate
        z = gate * (LINEAR.value + cubic)
        sigmoid = torch.sigmoid(z)
        # z' is steep enough to magnify what 1 - sigmoid cancels
        slope = 1 + gate * (LINEAR.value + 3 * cubic) * torch.sigmoid(-z)
    activated = gate * sigmoid
    grad_gate = grad_h.float() * up * sigmoid * slope
    grad_up = grad_h.float() * activated
    grad_gate_up = torch.cat((grad_gate * is_inside[0], grad_up * is_inside[1]), dim=1)
    return grad_gate_up.to(gate_up.dtype), (activated * up).to(gate_up.dtype)


@triton.jit
def load_chunks(ptr, first, width, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    tiles = ()
    for chunk in tl.static_range(CHUNKS):
        offs = first + chunk * CHUNK + tl.arange(0, CHUNK)
        tiles = tiles + (tl.load(ptr + offs, mask=offs < width, other=0.0),)  # noqa: RUF005, triton knows no star
    return tiles


@triton.jit
def _sigmoid(x):
    # the divisor may be infinite, never zero
    return tl.fdiv(1.0, 1.0 + tl.exp(-x))


@triton.jit
def _curve(gate, ACTIVATION: tl.constexpr):
    z = gate
    if ACTIVATION == "gelu_tanh":
        z *= LINEAR + CUBIC * gate * gate
    if ACTIVATION == "clamped_swish":
        z *= STEEPNESS
    return z


@triton.jit
def _limited(gate, up, ACTIVATION: tl.constexpr):
    if ACTIVATION == "clamped_swish":
        # comparisons keep what is no number
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up)) + 1.0
    return gate, up


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr):  # float32
    gate, up = _limited(gate, up, ACTIVATION)
    return gate * _sigmoid(_curve(gate, ACTIVATION)) * up


@triton.jit
def _glu_kernel(
    h_ptr,  # (M, width)
    gate_up_ptr,  # (M, 2 width)
    width,
    programs_per_row,
    stride_hm,
    stride_m,
    ACTIVATION: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    # one program gates CHUNKS * CHUNK values of one row
    row = (tl.program_id(0) // programs_per_row).to(tl.int64)
    first = (tl.program_id(0) % programs_per_row) * (CHUNK * CHUNKS)
    gate_ptr = gate_up_ptr + row * stride_m
    h_ptr += row * stride_hm
    gates = load_chunks(gate_ptr, first, width, CHUNK, CHUNKS)
    ups = load_chunks(gate_ptr + width, first, width, CHUNK, CHUNKS)
    for chunk in tl.static_range(CHUNKS):
        h = gated(gates[chunk].to(tl.float32), ups[chunk].to(tl.float32), ACTIVATION)
        offs = first + chunk * CHUNK + tl.arange(0, CHUNK)
        tl.store(h_ptr + offs, h.to(h_ptr.dtype.element_ty), mask=offs < width)


@triton.jit
def _glu_backward_kernel(
    grad_gate_up_ptr,  # (M, 2 width), may be gate_up
    h_ptr,  # (M, width), may be grad_h
    grad_h_ptr,  # (M, width)
    gate_up_ptr,  # (M, 2 width)
    width,
    programs_per_row,
    stride_grad_m,
    stride_hm,
    stride_grad_hm,
    stride_m,
    ACTIVATION: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    # one program computes the gradients of CHUNKS * CHUNK gates and ups of one row
    row = (tl.program_id(0) // programs_per_row).to(tl.int64)
    first = (tl.program_id(0) % programs_per_row) * (CHUNK * CHUNKS)
    gate_ptr = gate_up_ptr + row * stride_m
    grad_gate_ptr = grad_gate_up_ptr + row * stride_grad_m
    h_ptr += row * stride_hm
    grads_h = load_chunks(grad_h_ptr + row * stride_grad_hm, first, width, CHUNK, CHUNKS)
    gates = load_chunks(gate_ptr, first, width, CHUNK, CHUNKS)
    ups = load_chunks(gate_ptr + width, first, width, CHUNK, CHUNKS)
    for chunk in tl.static_range(CHUNKS):
        grad_h = grads_h[chunk].to(tl.float32)
        stored_gate, stored_up = gates[chunk].to(tl.float32), ups[chunk].to(tl.float32)
        gate, up = _limited(stored_gate, stored_up, ACTIVATION)
        z = _curve(gate, ACTIVATION)
        sigmoid = _sigmoid(z)
        activated = gate * sigmoid
        if ACTIVATION == "gelu_tanh":
            # z' is steep enough to magnify what 1 - sigmoid cancels
            rest = activated * (LINEAR + 3.0 * CUBIC * gate * gate) * _sigmoid(-z)
        else:
            rest = activated * (1.0 - sigmoid)
        if ACTIVATION == "clamped_swish":
            rest *= STEEPNESS
        grad_gate = grad_h * up * (sigmoid + rest)
        grad_up = grad_h * activated
        if ACTIVATION == "clamped_swish":
            grad_gate = tl.where(stored_gate > LIMIT, 0.0, grad_gate)
            grad_up = tl.where(tl.abs(stored_up) > LIMIT, 0.0, grad_up)
        offs = first + chunk * CHUNK + tl.arange(0, CHUNK)
        mask = offs < width
        dtype = grad_gate_up_ptr.dtype.element_ty
        tl.store(grad_gate_ptr + offs, grad_gate.to(dtype), mask=mask)
        tl.store(grad_gate_ptr + width + offs, grad_up.to(dtype), mask=mask)
        tl.store(h_ptr + offs, (activated * up).to(dtype), mask=mask)


def _shape(width: int, itemsize: int) -> dict[str, int]:
    """Choose tiles that have a vector for every thread: no value is loaded by two."""
    vector = VECTOR_BYTES // itemsize
    return {
        "CHUNK": 32 * NUM_WARPS * vector,
        # values that are loaded one by one take a register each
        "CHUNKS": CHUNKS if width % vector == 0 else 1,
        "num_warps": NUM_WARPS,
    }


def _launch_glu(
    gate_up: Tensor,  # (M, 2 F)
    activation: Activation,
    out: Tensor | None = None,  # (M, F)
) -> Tensor:  # (M, F)
    M, width = gate_up.shape[0], gate_up.shape[1] // 2
    h = torch.empty((M, width), dtype=gate_up.dtype, device=gate_up.device) if out is None else out
    shape = _shape(width, gate_up.element_size())
    programs_per_row = cdiv(width, shape["CHUNK"] * shape["CHUNKS"])
    if M > 0:
        launch(
            _glu_kernel,
            (M * programs_per_row,),
            h_ptr=h,
            gate_up_ptr=gate_up,
            width=width,
            programs_per_row=programs_per_row,
            stride_hm=h.stride(0),
            stride_m=gate_up.stride(0),
            ACTIVATION=activation,
            # multiply-adds round less
            enable_fp_fusion=True,
            **shape,
        )
    return h


def _launch_glu_backward(
    grad_h: Tensor,  # (M, F)
    gate_up: Tensor,  # (M, 2 F)
    activation: Activation,
    grad_gate_up: Tensor,  # (M, 2 F), written; may be gate_up
    h: Tensor,  # (M, F), written; may be grad_h
) -> None:
    M, width = grad_h.shape
    shape = _shape(width, gate_up.element_size())
    programs_per_row = cdiv(width, shape["CHUNK"] * shape["CHUNKS"])
    if M > 0:
        launch(
            _glu_backward_kernel,
            (M * programs_per_row,),
            grad_gate_up_ptr=grad_gate_up,
            h_ptr=h,
            grad_h_ptr=grad_h,
            gate_up_ptr=gate_up,
            width=width,
            programs_per_row=programs_per_row,
            stride_grad_m=grad_gate_up.stride(0),
            stride_hm=h.stride(0),
            stride_grad_hm=grad_h.stride(0),
            stride_m=gate_up.stride(0),
            ACTIVATION=activation,
            enable_fp_fusion=True,
            **shape,
        )


def check_gate_up(gate_up: Tensor, activation: Activation) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"the activation must be one of {', '.join(ACTIVATIONS)}: got {activation!r}"
        )
    check_dtype("gate_up", gate_up.dtype)
    if gate_up.dim() != 2 or gate_up.shape[1] == 0 or gate_up.shape[1] % 2 != 0:
        raise ValueError(
            f"gate_up must be a matrix of rows of two halves: got shape {tuple(gate_up.shape)}"
        )
    check_rows_are_contiguous("gate_up", gate_up)
    check_not_recorded({"gate_up": gate_up}, "glu_backward")


def check_half(name: str, half: Tensor, gate_up: Tensor) -> None:
    """Refuse a matrix, to be written to, that is not like one half of gate_up."""
    M, width = gate_up.shape[0], gate_up.shape[1] // 2
    if half.shape != (M, width) or half.dtype != gate_up.dtype:
        raise ValueError(
            f"{name} must have half of gate_up's columns and its dtype: got {half.dtype} "
            f"{tuple(half.shape)} beside {gate_up.dtype} {tuple(gate_up.shape)}"
        )
    check_one_device({name: half, "gate_up": gate_up})
    check_rows_are_contiguous(name, half)
    check_rows_are_apart(name, half)
    check_not_recorded({name: half}, "glu_backward")


def glu(
    gate_up: Tensor,  # (M, 2 F): the gates, then what they gate
    activation: Activation,
    out: Tensor | None = None,  # (M, F)
) -> Tensor:  # (M, F)
    """Gate one half of each row by the other.

        h = activation(gate) * up               of clamped_swish as the module says

    Args:
        out: what to write into and return, for instance the first F columns of a wider matrix,
            whose other columns stay as they are; shares no memory with gate_up. A new tensor if
            None.

    Raises:
        ValueError: the activation is unknown, shapes, dtypes or devices do not fit, a row is not
            contiguous, or something requires a gradient.
    """
    check_gate_up(gate_up, activation)
    if out is not None:
        check_half("out", out, gate_up)
    if gate_up.device.type == "cpu":
        h = glu_reference(gate_up, activation)
        return h if out is None else out.copy_(h)
    return _launch_glu(gate_up, activation, out)


def glu_backward(
    grad_h: Tensor,  # (M, F), overwritten
    gate_up: Tensor,  # (M, 2 F), overwritten
    activation: Activation,
) -> tuple[Tensor, Tensor]:  # grad_gate_up (M, 2 F), h (M, F)
    """Compute the gradient of `glu` and its result again, in place.

        grad_gate = grad_h up activation'(gate)
        grad_up   = grad_h activation(gate)
        h         = activation(gate) up

    The gradient of a low-rank update on h needs h, so the forward pass need not keep it.

    Args:
        grad_h: h is written over it.
        gate_up: its gradient is written over it.

    Returns:
        grad_gate_up: gate_up itself.
        h: grad_h itself.

    Raises:
        ValueError: the activation is unknown, shapes, dtypes or devices do not fit, a row is not
            contiguous, or something requires a gradient.
    """
    check_gate_up(gate_up, activation)
    check_half("grad_h", grad_h, gate_up)
    check_rows_are_apart("gate_up", gate_up)
    if gate_up.device.type == "cpu":
        grad_gate_up, h = glu_backward_reference(grad_h, gate_up, activation)
        return gate_up.copy_(grad_gate_up), grad_h.copy_(h)
    _launch_glu_backward(grad_h, gate_up, activation, gate_up, grad_h)
    return gate_up, grad_h
