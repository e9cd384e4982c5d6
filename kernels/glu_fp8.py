"""Gate a layer's inner activations as `glu.py` does, and quantize the rows to E4M3 on the way.

    h      = activation(gate) up                   (M, F)
    fp8    = E4M3 of h with a scale a row          (M, F), (M,)

The FP8 product of down reads h in 8 bits, its low-rank updates in 16. A pass of its own would read
h again. One program holds a row of h in registers, so that its largest magnitude is known before a
value is rounded to 8 bits. With M rows in 16 bits it moves 7 M F bytes, two values read and one
written, and half as many bytes again: memory bandwidth is the limit.

h equals `glu`'s and fp8 equals `quantize_rows` of it, bit for bit. Rows of more than MAX_CHUNKS
chunks take those two. The gradient is quantized where it is multiplied (`lora/expansion.py`).
"""

# triton's annotations know neither static_range nor tuples of tensors
# pyright: reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false

from torch import Tensor

from kernels.fp8 import Fp8Rows
from kernels.fp8_rows import (
    check_fp8_rows,
    magnitude_bits,
    quantize_rows,
    scale_of_bits,
    store_quantized,
)
from kernels.glu import (
    VECTOR_BYTES,
    Activation,
    check_gate_up,
    check_half,
    gated,
    glu,
    load_chunks,
)
from kernels.language import tl, triton
from kernels.launch import cdiv, launch

NUM_WARPS = 8
# of both dtypes in 16 bits, a vector a thread
CHUNK = NUM_WARPS * 32 * VECTOR_BYTES // 2
# of a result that a program holds
MAX_CHUNKS = 8


@triton.jit
def _glu_fp8_kernel(
    values_ptr,  # (M, width)
    scales_ptr,  # (M,)
    h_ptr,  # (M, width)
    gate_up_ptr,  # (M, 2 width)
    width,
    stride_vm,
    stride_hm,
    stride_m,
    ACTIVATION: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    # one program gates one row
    row = tl.program_id(0).to(tl.int64)
    gate_ptr = gate_up_ptr + row * stride_m
    h_ptr += row * stride_hm
    gates = load_chunks(gate_ptr, 0, width, CHUNK, CHUNKS)
    ups = load_chunks(gate_ptr + width, 0, width, CHUNK, CHUNKS)
    bits = tl.zeros((CHUNK,), tl.int16)
    tiles = ()
    for chunk in tl.static_range(CHUNKS):
        h = gated(gates[chunk].to(tl.float32), ups[chunk].to(tl.float32), ACTIVATION)
        h = h.to(h_ptr.dtype.element_ty)
        offs = chunk * CHUNK + tl.arange(0, CHUNK)
        tl.store(h_ptr + offs, h, mask=offs < width)
        bits = tl.maximum(bits, magnitude_bits(h))
        tiles = tiles + (h,)  # noqa: RUF005, triton knows no star
    scale = scale_of_bits(bits, h_ptr.dtype.element_ty)
    tl.store(scales_ptr + row, scale)
    store_quantized(values_ptr + row * stride_vm, tiles, scale, width, CHUNK, CHUNKS)


def _launch_glu_fp8(gate_up: Tensor, activation: Activation, out: Tensor, fp8: Fp8Rows) -> None:
    M, width = out.shape
    if M > 0:
        launch(
            _glu_fp8_kernel,
            (M,),
            values_ptr=fp8.values,
            scales_ptr=fp8.scales,
            h_ptr=out,
            gate_up_ptr=gate_up,
            width=width,
            stride_vm=fp8.values.stride(0),
            stride_hm=out.stride(0),
            stride_m=gate_up.stride(0),
            ACTIVATION=activation,
            CHUNK=CHUNK,
            CHUNKS=cdiv(width, CHUNK),
            num_warps=NUM_WARPS,
            # multiply-adds round less
            enable_fp_fusion=True,
        )


def glu_fp8(
    gate_up: Tensor,  # (M, 2 F): the gates, then what they gate
    activation: Activation,
    out: Tensor,  # (M, F), written
    fp8: Fp8Rows,  # (M, F), written
) -> None:
    """Gate one half of each row by the other, and quantize the result to E4M3.

        out = activation(gate) * up
        fp8 = quantize_rows(out)

    Args:
        out: may be the first F columns of a wider matrix; shares no memory with gate_up.

    Raises:
        ValueError: as `glu` and `quantize_rows` do.
        RuntimeError: the GPU has no FP8 products.
    """
    check_gate_up(gate_up, activation)
    check_half("out", out, gate_up)
    check_fp8_rows(out, fp8)
    if out.device.type != "cpu" and out.shape[1] <= MAX_CHUNKS * CHUNK:
        _launch_glu_fp8(gate_up, activation, out, fp8)
    else:
        quantize_rows(glu(gate_up, activation, out), fp8)
