"""What the kernels of RMSNorm share: the arithmetic of a row, its chunks, and the checks.

    row of D | chunk 0   | chunk 1   | ...       16 bytes a thread and chunk: 8 values in 16 bit

A row of at most MAX_CHUNKS chunks, or MAX_CENTRED_CHUNKS, is held in registers (`rms_norm.py`,
`rms_norm_backward.py`); a longer row is read twice (`rms_norm_long.py`). The arithmetic is the same
in both.
"""

# triton's annotations know neither static_range nor tuples of tensors
# pyright: reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false

from torch import Tensor

from kernels.checks import (
    check_dtype,
    check_is_contiguous,
    check_like,
    check_not_recorded,
    check_one_device,
    check_rows_are_apart,
    check_rows_are_contiguous,
)
from kernels.language import tl, triton
from kernels.launch import cdiv

# the widest access of a thread
VECTOR_BYTES = 16
# vectors that a thread should have of a row, if it may choose the number of warps
VECTORS = 4
MAX_WARPS = 8
# of a row in registers, and of one that is centred, whose backward pass takes more of them
MAX_CHUNKS, MAX_CENTRED_CHUNKS = 8, 4


@triton.jit
def load_row(row_ptr, D, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    tiles = ()
    for chunk in tl.static_range(CHUNKS):
        offs = chunk * CHUNK + tl.arange(0, CHUNK)
        tiles = tiles + (tl.load(row_ptr + offs, mask=offs < D, other=0.0),)  # noqa: RUF005, triton knows no star
    return tiles


@triton.jit
def factor_of(weight, OFFSET: tl.constexpr):
    w = weight.to(tl.float32)
    if OFFSET != 0:
        w += OFFSET
    return w


@triton.jit
def sum_with_residual(x, residual, DTYPE: tl.constexpr):
    return (x.to(tl.float32) + residual.to(tl.float32)).to(DTYPE)


@triton.jit
def mean_of(values, D, IS_CENTRED: tl.constexpr):
    # of a row whose values beyond D are zero; zero where rows are not centred
    if IS_CENTRED:
        return tl.div_rn(tl.sum(values, 0), D * 1.0)
    return 0.0


@triton.jit
def centred(r, mean, is_inside, IS_CENTRED: tl.constexpr):
    wide = r.to(tl.float32)
    if IS_CENTRED:
        wide = tl.where(is_inside, wide - mean, 0.0)
    return wide


@triton.jit
def rstd_of(squares, D, eps):
    mean = tl.div_rn(tl.sum(squares, 0), D * 1.0)
    return tl.div_rn(1.0, tl.sqrt_rn(mean + eps))


@triton.jit
def slope_of(products, rstd, D):
    # the mean of g r rstd; r rstd is of order one where rstd^3 may overflow
    return tl.div_rn(tl.sum(products, 0) * rstd, D * 1.0)


@triton.jit
def gradient_of(g, r, rstd, slope):
    return rstd * (g - r * rstd * slope)


def centred_reference(r: Tensor, is_centred: bool) -> Tensor:  # (M, D) -> (M, D) float32
    """Subtract each row's mean, where rows are centred."""
    wide = r.float()
    return wide - wide.mean(dim=1, keepdim=True) if is_centred else wide


def shape_of(x: Tensor, is_centred: bool = False) -> dict[str, int]:
    """Choose warps and chunks of a row, so that a thread has about VECTORS of its vectors.

    Without CHUNKS the row does not fit the registers.
    """
    D = x.shape[1]
    warp_width = 32 * VECTOR_BYTES // x.element_size()
    wanted = max(D // (VECTORS * warp_width), 1)
    # the power of two below: a row of 5 * 1024 takes five chunks, and no thread is idle
    num_warps = min(1 << (wanted.bit_length() - 1), MAX_WARPS)
    chunk = num_warps * warp_width
    num_chunks = cdiv(D, chunk)
    shape = {"CHUNK": chunk, "num_warps": num_warps}
    most = MAX_CENTRED_CHUNKS if is_centred else MAX_CHUNKS
    return shape | {"CHUNKS": num_chunks} if num_chunks <= most else shape


def quantizes(shape: dict[str, int]) -> bool:
    """Tell whether a kernel has registers left to hold a row's result until it is quantized."""
    return shape.get("CHUNKS", MAX_CHUNKS) <= MAX_CENTRED_CHUNKS


def check_rows(weight: Tensor, **matrices: Tensor | None) -> None:
    """Refuse matrices, by name, that are not like the first, and a weight that does not fit it.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, a row is not contiguous, rows to be
            written overlap, or something requires a gradient.
    """
    given = {name: matrix for name, matrix in matrices.items() if matrix is not None}
    first, x = next(iter(given.items()))
    check_dtype(first, x.dtype)
    if x.dim() != 2 or x.shape[1] == 0 or weight.shape != x.shape[1:]:
        raise ValueError(
            f"{first} must be a matrix of rows as long as the weight: "
            f"got shapes {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    for name, matrix in given.items():
        check_like(name, matrix, first, x)
        check_rows_are_contiguous(name, matrix)
        if name in ("out", "y"):
            check_rows_are_apart(name, matrix)
    check_is_contiguous("the weight", weight)
    check_one_device(given | {"the weight": weight})
    if weight.requires_grad:
        raise ValueError("the weight must be frozen: got one that requires a gradient")
    check_not_recorded(given, "rms_norm_backward")
