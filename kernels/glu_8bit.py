"""Gate a layer's inner activations as `glu.py` does, and quantize the rows to 8 bits on the way.

    h      = activation(gate) up                               (M, F)
    rows   = h with a scale a row, in E4M3 or rotated in INT8  (M, F), (M,)

The product of down reads h in 8 bits, its low-rank updates in 16. A pass of its own would read h
again. One program holds a row of h in registers, so that its largest magnitude is known before a
value is rounded to 8 bits. With M rows in 16 bits it moves 7 M F bytes, two values read and one
written, and half as many bytes again: memory bandwidth is the limit.

h equals `glu`'s and the rows equal `quantize_rows` of it, bit for bit. Rows of more than MAX_WIDTH
values take those two. The gradient is quantized where it is multiplied (`lora/expansion.py`).
"""

# triton's annotations know neither static_range nor tuples of tensors
# pyright: reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false

from torch import Tensor

from kernels.fp8 import E4M3
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
from kernels.rotation import INT8, EightBitRows
from kernels.rows_8bit import (
    check_8bit_rows,
    magnitude_bits,
    no_magnitudes,
    quantize_rows,
    scale_of_bits,
    store_quantized,
)

# rotated values take a register each
NUM_WARPS = {E4M3: 8, INT8: 16}
# of a result that a program holds
MAX_WIDTH = 16_384


@triton.jit
def _glu_8bit_kernel(
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
    FORMAT: tl.constexpr = values_ptr.dtype.element_ty
    bits = no_magnitudes(CHUNK, FORMAT)
    tiles = ()
    for chunk in tl.static_range(CHUNKS):
        h = gated(gates[chunk].to(tl.float32), ups[chunk].to(tl.float32), ACTIVATION)
        h = h.to(h_ptr.dtype.element_ty)
        offs = chunk * CHUNK + tl.arange(0, CHUNK)
        tl.store(h_ptr + offs, h, mask=offs < width)
        bits = tl.maximum(bits, magnitude_bits(h, FORMAT))
        tiles = tiles + (h,)  # noqa: RUF005, triton knows no star
    scale = scale_of_bits(bits, h_ptr.dtype.element_ty, FORMAT)
    tl.store(scales_ptr + row, scale)
    store_quantized(values_ptr + row * stride_vm, tiles, scale, width, CHUNK, CHUNKS)


def _launch_glu_8bit(
    gate_up: Tensor, activation: Activation, out: Tensor, rows: EightBitRows
) -> None:
    M, width = out.shape
    num_warps = NUM_WARPS[rows.values.dtype]
    # a vector a thread
    chunk = num_warps * 32 * VECTOR_BYTES // out.element_size()
    if M > 0:
        launch(
            _glu_8bit_kernel,
            (M,),
            values_ptr=rows.values,
            scales_ptr=rows.scales,
            h_ptr=out,
            gate_up_ptr=gate_up,
            width=width,
            stride_vm=rows.values.stride(0),
            stride_hm=out.stride(0),
            stride_m=gate_up.stride(0),
            ACTIVATION=activation,
            CHUNK=chunk,
            CHUNKS=cdiv(width, chunk),
            num_warps=num_warps,
            # multiply-adds round less
            enable_fp_fusion=True,
        )


def glu_8bit(
    gate_up: Tensor,  # (M, 2 F): the gates, then what they gate
    activation: Activation,
    out: Tensor,  # (M, F), written
    rows: EightBitRows,  # (M, F), written
) -> None:
    """Gate one half of each row by the other, and quantize the result to 8 bits.

        out = activation(gate) * up
        rows = quantize_rows(out)

    Args:
        out: may be the first F columns of a wider matrix; shares no memory with gate_up.

    Raises:
        ValueError: as `glu` and `quantize_rows` do.
        RuntimeError: E4M3 is asked of a GPU without FP8 products.
    """
    check_gate_up(gate_up, activation)
    check_half("out", out, gate_up)
    check_8bit_rows(out, rows)
    if out.device.type != "cpu" and out.shape[1] <= MAX_WIDTH:
        _launch_glu_8bit(gate_up, activation, out, rows)
    else:
        quantize_rows(glu(gate_up, activation, out), rows)
