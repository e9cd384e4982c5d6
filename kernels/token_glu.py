"""Gate a few rows and project them down to the ranks of their update, in one launch.

    y = activation(gate) up              h = y A^T

    program (row, p) | chunk 0 | chunk 1 | ...     y of each chunk, h[row, p] = y . A[p]
                       program p writes chunks p, p + P, ...

`glu.py` gates many rows. Here, as in `token_norm.py`, each of P programs a row computes the row
again, because the projection that follows needs h before it begins. A program reads 6 F bytes in
16 bits, most of them from L2. y is rounded before it is multiplied by A, as in training.

Gated linear units: Shazeer 2020. LoRA: Hu et al. 2021.
"""

# triton's annotations know neither static_range nor tuples of tensors
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from torch import Tensor

from kernels.checks import check_dtype, check_is, check_is_contiguous, check_one_device
from kernels.glu import Activation, gated, glu_reference, load_chunks
from kernels.language import tl, triton
from kernels.launch import cdiv, launch

NUM_WARPS = 16
# the widest access of a thread
VECTOR_BYTES = 16


def token_glu_reference(
    gate_up: Tensor,  # (M, 2 F)
    activation: Activation,
    A: Tensor,  # (P, F)
) -> tuple[Tensor, Tensor]:  # y (M, F), h (M, P)
    """Gate as `glu_reference` does, and multiply in float32."""
    y = glu_reference(gate_up, activation)
    return y, (y.float() @ A.float().T).to(y.dtype)


@triton.jit
def _token_glu_kernel(
    y_ptr,  # (M, F), contiguous like all matrices here
    h_ptr,  # (M, P)
    gate_up_ptr,  # (M, 2 F)
    A_ptr,  # (P, F)
    F,
    ACTIVATION: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    # one program computes h of one row and one rank, and writes its share of y
    row = tl.program_id(0).to(tl.int64)
    rank = tl.program_id(1)
    gate_ptr = gate_up_ptr + row * 2 * F
    ranks = load_chunks(A_ptr + rank.to(tl.int64) * F, 0, F, CHUNK, CHUNKS)
    gates = load_chunks(gate_ptr, 0, F, CHUNK, CHUNKS)
    ups = load_chunks(gate_ptr + F, 0, F, CHUNK, CHUNKS)
    acc = tl.zeros((CHUNK,), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        y = gated(gates[chunk].to(tl.float32), ups[chunk].to(tl.float32), ACTIVATION)
        y = y.to(y_ptr.dtype.element_ty)
        offs = chunk * CHUNK + tl.arange(0, CHUNK)
        is_own = offs // CHUNK % tl.num_programs(1) == rank
        tl.store(y_ptr + row * F + offs, y, mask=(offs < F) & is_own)
        acc += y.to(tl.float32) * ranks[chunk].to(tl.float32)
    h = tl.sum(acc, 0)
    tl.store(h_ptr + row * tl.num_programs(1) + rank, h.to(h_ptr.dtype.element_ty))


def _launch_token_glu(gate_up: Tensor, activation: Activation, A: Tensor) -> tuple[Tensor, Tensor]:
    M, (P, F) = gate_up.shape[0], A.shape
    y, h = gate_up.new_empty(M, F), gate_up.new_empty(M, P)
    chunk = 32 * NUM_WARPS * VECTOR_BYTES // gate_up.element_size()
    launch(
        _token_glu_kernel,
        (M, P),
        y_ptr=y,
        h_ptr=h,
        gate_up_ptr=gate_up,
        A_ptr=A,
        F=F,
        ACTIVATION=activation,
        CHUNK=chunk,
        CHUNKS=cdiv(F, chunk),
        num_warps=NUM_WARPS,
    )
    return y, h


def token_glu(
    gate_up: Tensor,  # (M, 2 F): gates, ups
    activation: Activation,
    A: Tensor,  # (P, F)
) -> tuple[Tensor, Tensor]:  # y (M, F), h (M, P)
    """Gate, and multiply the result by A.

        y = activation(gate) up        h = y A^T

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a matrix is not contiguous.
    """
    check_dtype("gate_up", gate_up.dtype)
    check_is("gate_up", gate_up, A.dtype, (gate_up.shape[0], 2 * A.shape[1]))
    for name, matrix in (("gate_up", gate_up), ("A", A)):
        check_is_contiguous(name, matrix)
    check_one_device({"gate_up": gate_up, "A": A})
    if gate_up.device.type == "cpu":
        return token_glu_reference(gate_up, activation, A)
    return _launch_token_glu(gate_up, activation, A)
