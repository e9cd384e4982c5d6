"""Gate a layer's inner activations, h = silu(gate) * up, forward and in-place backward on the GPU.

    s         = 1 / (1 + exp(-gate))
    h         = gate s up
    grad_gate = grad_h up s (1 + gate (1 - s))
    grad_up   = grad_h gate s

    gate_up        | gate 0 .. F-1      | up 0 .. F-1      |     a row, as the linear group
    grad_gate_up   | grad_gate 0 .. F-1 | grad_up 0 .. F-1 |     writes it and wants it back
    h              | h 0 .. F-1         |

Saved for the backward pass is gate_up, once: neither the halves apart nor s nor h. The backward
kernel reads a value and writes its gradient in the same thread, so the gradient may take gate_up's
place, and h, which the gradient of what follows needs again, that of grad_h. With M rows and S
bytes a value:

    forward                 3 M F S       two read, one written
    backward                5 M F S       three read, two written
    backward and h again    6 M F S

and about 10 operations a value forward, 20 backward, two of them on the special function unit:
memory bandwidth is the limit. The arithmetic is float32, each result rounded once, where torch
rounds silu(gate) before it is multiplied.

SwiGLU: Shazeer 2020, "GLU Variants Improve Transformer", equation 6.
"""

# triton's annotations know neither launch options nor static_range, nor tuples of tensors
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

NUM_WARPS = 4
# the widest access of a thread
VECTOR_BYTES = 16
# of a program, whose loads are all under way before the first is worked on
CHUNKS = 2


def swiglu_reference(gate_up: Tensor) -> Tensor:  # (..., 2 F) -> (..., F)
    """Gate in the tensor's dtype, rounding silu and product."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_backward_reference(
    grad_h: Tensor,  # (..., F)
    gate_up: Tensor,  # (..., 2 F)
) -> tuple[Tensor, Tensor]:  # grad_gate_up (..., 2 F), h (..., F)
    """Compute the gradient and the forward result in float32, each rounded once."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    grad_gate = grad_h.float() * up * sigmoid * (1 + gate * (1 - sigmoid))
    grad_up = grad_h.float() * silu
    grad_gate_up = torch.cat((grad_gate, grad_up), dim=-1)
    return grad_gate_up.to(gate_up.dtype), (silu * up).to(gate_up.dtype)


@triton.jit
def _load_chunks(ptr, first, width, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
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
def _swiglu_kernel(
    h_ptr,  # (M, width)
    gate_up_ptr,  # (M, 2 width)
    width,
    programs_per_row,
    stride_m,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    # one program gates CHUNKS * CHUNK values of one row
    row = (tl.program_id(0) // programs_per_row).to(tl.int64)
    first = (tl.program_id(0) % programs_per_row) * (CHUNK * CHUNKS)
    gate_ptr = gate_up_ptr + row * stride_m
    h_ptr += row * width
    gates = _load_chunks(gate_ptr, first, width, CHUNK, CHUNKS)
    ups = _load_chunks(gate_ptr + width, first, width, CHUNK, CHUNKS)
    for chunk in tl.static_range(CHUNKS):
        gate = gates[chunk].to(tl.float32)
        h = gate * _sigmoid(gate) * ups[chunk].to(tl.float32)
        offs = first + chunk * CHUNK + tl.arange(0, CHUNK)
        tl.store(h_ptr + offs, h.to(h_ptr.dtype.element_ty), mask=offs < width)


@triton.jit
def _swiglu_backward_kernel(
    grad_gate_up_ptr,  # (M, 2 width), may be gate_up
    h_ptr,  # (M, width), may be grad_h; written if WRITES_H
    grad_h_ptr,  # (M, width)
    gate_up_ptr,  # (M, 2 width)
    width,
    programs_per_row,
    stride_grad_m,
    stride_hm,
    stride_grad_hm,
    stride_m,
    WRITES_H: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    # one program computes the gradients of CHUNKS * CHUNK gates and ups of one row
    row = (tl.program_id(0) // programs_per_row).to(tl.int64)
    first = (tl.program_id(0) % programs_per_row) * (CHUNK * CHUNKS)
    gate_ptr = gate_up_ptr + row * stride_m
    grad_gate_ptr = grad_gate_up_ptr + row * stride_grad_m
    h_ptr += row * stride_hm
    grads_h = _load_chunks(grad_h_ptr + row * stride_grad_hm, first, width, CHUNK, CHUNKS)
    gates = _load_chunks(gate_ptr, first, width, CHUNK, CHUNKS)
    ups = _load_chunks(gate_ptr + width, first, width, CHUNK, CHUNKS)
    for chunk in tl.static_range(CHUNKS):
        grad_h, up = grads_h[chunk].to(tl.float32), ups[chunk].to(tl.float32)
        gate = gates[chunk].to(tl.float32)
        sigmoid = _sigmoid(gate)
        silu = gate * sigmoid
        grad_gate = grad_h * up * (sigmoid + silu * (1.0 - sigmoid))
        grad_up = grad_h * silu
        offs = first + chunk * CHUNK + tl.arange(0, CHUNK)
        mask = offs < width
        dtype = grad_gate_up_ptr.dtype.element_ty
        tl.store(grad_gate_ptr + offs, grad_gate.to(dtype), mask=mask)
        tl.store(grad_gate_ptr + width + offs, grad_up.to(dtype), mask=mask)
        if WRITES_H:
            tl.store(h_ptr + offs, (silu * up).to(dtype), mask=mask)


def _shape(width: int, itemsize: int) -> dict[str, int]:
    """Choose tiles that have a vector for every thread: no value is loaded by two."""
    vector = VECTOR_BYTES // itemsize
    return {
        "CHUNK": 32 * NUM_WARPS * vector,
        # values that are loaded one by one take a register each
        "CHUNKS": CHUNKS if width % vector == 0 else 1,
        "num_warps": NUM_WARPS,
    }


def _with_contiguous_rows(x: Tensor) -> Tensor:
    """Copy a matrix whose rows are scattered, such as the gradient of a sum."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _launch_swiglu(gate_up: Tensor) -> Tensor:  # (M, 2 F) -> (M, F)
    M, width = gate_up.shape[0], gate_up.shape[1] // 2
    h = torch.empty((M, width), dtype=gate_up.dtype, device=gate_up.device)
    shape = _shape(width, gate_up.element_size())
    programs_per_row = triton.cdiv(width, shape["CHUNK"] * shape["CHUNKS"])
    if M > 0:
        # triton launches on the current device, which need not be the buffer's
        with torch.cuda.device_of(gate_up):
            _swiglu_kernel[(M * programs_per_row,)](
                h,
                gate_up,
                width,
                programs_per_row,
                gate_up.stride(0),
                # multiply-adds round less
                enable_fp_fusion=True,
                **shape,
            )
    return h


def _launch_swiglu_backward(
    grad_h: Tensor,  # (M, F)
    gate_up: Tensor,  # (M, 2 F)
    grad_gate_up: Tensor,  # (M, 2 F), written; may be gate_up
    h: Tensor | None,  # (M, F), written; may be grad_h
) -> None:
    M, width = grad_h.shape
    assert all(x.stride(1) == 1 or width == 1 for x in (grad_h, gate_up, grad_gate_up))
    shape = _shape(width, gate_up.element_size())
    programs_per_row = triton.cdiv(width, shape["CHUNK"] * shape["CHUNKS"])
    if M > 0:
        with torch.cuda.device_of(gate_up):
            _swiglu_backward_kernel[(M * programs_per_row,)](
                grad_gate_up,
                grad_h if h is None else h,
                grad_h,
                gate_up,
                width,
                programs_per_row,
                grad_gate_up.stride(0),
                grad_h.stride(0) if h is None else h.stride(0),
                grad_h.stride(0),
                gate_up.stride(0),
                WRITES_H=h is not None,
                enable_fp_fusion=True,
                **shape,
            )


class _SwiGLU(torch.autograd.Function):
    """Gating over one buffer, which is all that is saved.

        h         = gate s up                        s = sigmoid(gate)
        grad_gate = grad_h up s (1 + gate (1 - s))
        grad_up   = grad_h gate s

    With `overwrites` the gradient takes gate_up's place: nobody else may need it, and there is no
    second backward pass. Autograd learns of it, so either gets an error, not wrong gradients.
    """

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, overwrites: bool) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.overwrites = overwrites
        return _launch_swiglu(gate_up)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        grad_h = _with_contiguous_rows(grad_outputs[0])
        if ctx.overwrites:
            # detached: what is returned as a gradient must not carry a graph
            grad_gate_up = gate_up.detach()
        else:
            grad_gate_up = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
        _launch_swiglu_backward(grad_h, gate_up, grad_gate_up, None)
        if ctx.overwrites:
            torch.autograd.graph.increment_version(gate_up)
        return grad_gate_up, None


def _check(gate_up: Tensor) -> None:
    if gate_up.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"gate_up must be bfloat16, float16 or float32: got {gate_up.dtype}")
    if gate_up.dim() == 0 or gate_up.shape[-1] == 0 or gate_up.shape[-1] % 2 != 0:
        raise ValueError(f"gate_up must have rows of two halves: got shape {tuple(gate_up.shape)}")


def swiglu(
    gate_up: Tensor,  # (..., 2 F): the gates, then what they gate
    overwrites: bool = False,
) -> Tensor:  # (..., F)
    """Gate one half of each row by the other.

        h = silu(gate) * up

    Args:
        overwrites: let the backward pass on a GPU write the gradient over gate_up, which saves its
            size in memory. For a buffer that nothing else holds, in a graph that runs backward
            once; otherwise autograd raises an error.

    Raises:
        ValueError: gate_up is not floating point or has no two halves, or is a leaf that requires a
            gradient and is to be overwritten.
    """
    _check(gate_up)
    if overwrites and gate_up.is_leaf and gate_up.requires_grad:
        raise ValueError("gate_up must be a result to be overwritten: got a leaf; clone it")
    if gate_up.device.type == "cpu":
        return swiglu_reference(gate_up)
    rows = _with_contiguous_rows(gate_up.reshape(-1, gate_up.shape[-1]))
    h = _SwiGLU.apply(rows, overwrites)
    # a -1 would be ambiguous where there are no rows
    return h.view(*gate_up.shape[:-1], h.shape[1])


def swiglu_backward(
    grad_h: Tensor,  # (M, F)
    gate_up: Tensor,  # (M, 2 F)
) -> tuple[Tensor, Tensor]:  # grad_gate_up (M, 2 F), h (M, F)
    """Compute the gradient of `swiglu` and its result again, in place and without autograd.

    For a backward pass that is written out and did not save h: the gradient of a low-rank update on
    h needs it.

    Args:
        grad_h: on a GPU h is written over it.
        gate_up: on a GPU its gradient is written over it.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a row is not contiguous.
    """
    _check(gate_up)
    M, width = gate_up.shape[0], gate_up.shape[-1] // 2
    if gate_up.dim() != 2 or grad_h.shape != (M, width) or grad_h.dtype != gate_up.dtype:
        raise ValueError(
            f"grad_h must have half of gate_up's columns and its dtype: got {grad_h.dtype} "
            f"{tuple(grad_h.shape)} beside {gate_up.dtype} {tuple(gate_up.shape)}"
        )
    if grad_h.device != gate_up.device:
        raise ValueError(
            f"grad_h and gate_up must be on one device: got {grad_h.device} and {gate_up.device}"
        )
    if grad_h.stride(1) != 1 or gate_up.stride(1) != 1:
        raise ValueError(
            "grad_h and gate_up must have contiguous rows: "
            f"got strides {grad_h.stride()} and {gate_up.stride()}"
        )
    if gate_up.device.type == "cpu":
        return swiglu_backward_reference(grad_h, gate_up)
    _launch_swiglu_backward(grad_h, gate_up, gate_up, grad_h)
    return gate_up, grad_h
