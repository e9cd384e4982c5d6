"""Add uniform noise to embeddings, from random words that the kernel computes, on the GPU.

    x[m, k] += scale[m] u        u = 2^-23 (word >> 8) - 1, uniform in [-1, 1)

    counter  | k // 4 | m | site | 0 |      4 words of Philox  ->  columns 4 (k // 4) .. + 3
    key      | low, high word of the seed |

With scale = alpha / sqrt(L D) for a sample of L tokens and embeddings of D values this is the noise
of Jain et al. 2023, "NEFTune: Noisy Embeddings Improve Instruction Finetuning", section 2. Like a
dropout mask (kernels/dropout.py) the noise is a pure function of seed and place: a resumed run adds
the same noise, and a captured graph, which reads the seed from the device, adds other noise under
another seed. M rows move 2 M D values, once a micro-step.
"""

import torch
from torch import Tensor

from kernels.checks import (
    check_dtype,
    check_is,
    check_is_contiguous,
    check_one_device,
    check_seed,
)
from kernels.dropout import VECTOR_BYTES, VECTORS, WORD, philox_reference
from kernels.language import tl, triton
from kernels.launch import cdiv, launch

NUM_WARPS = 4
# the noise's number among what is drawn under one seed; the numbers of dropout count from 0
SITE = 2**31 - 1


def noise_scale(
    lengths: Tensor,  # (...,) int64: tokens of the sample that a row is of, 0 for padding
    alpha: float,
    D: int,
) -> Tensor:  # (...,) float32
    """Compute the largest noise of each token's embedding.

    scale = alpha / sqrt(L D), 0 for padding
    """
    return torch.where(lengths > 0, alpha / (lengths * D).clamp(min=1).sqrt(), 0.0).float()


def neftune_reference(x: Tensor, scale: Tensor, seed: Tensor) -> Tensor:  # (M, D), float32
    """Add the noise in float32; the result is not rounded to x's dtype yet."""
    M, D = x.shape
    low = WORD - 1
    row, group = torch.meshgrid(
        torch.arange(M, device=x.device), torch.arange(-(-D // 4), device=x.device), indexing="ij"
    )
    counter = (group, row, torch.full_like(row, SITE), torch.zeros_like(row))
    words = philox_reference(counter, (seed & low, seed >> 32 & low))
    u = (torch.stack(words, dim=2).flatten(1)[:, :D] >> 8).float() * 2.0**-23 - 1
    return x.float() + scale[:, None] * u


@triton.jit
def _neftune_kernel(
    x_ptr,  # (M, D)
    scale_ptr,  # (M,)
    seed_ptr,  # (1,)
    D,
    programs_per_row,
    SITE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    # one program adds to CHUNK values of one row
    row = tl.program_id(0) // programs_per_row
    first = (tl.program_id(0) % programs_per_row) * CHUNK
    groups = (first // 4 + tl.arange(0, CHUNK // 4)).to(tl.uint32)
    zeros = tl.zeros((CHUNK // 4,), tl.uint32)
    rows, sites = zeros + row.to(tl.uint32), zeros + SITE
    word0, word1, word2, word3 = tl.philox(tl.load(seed_ptr), groups, rows, sites, zeros)
    words = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))
    u = (words >> 8).to(tl.int32).to(tl.float32) * 1.1920928955078125e-07 - 1.0
    offs = first + tl.arange(0, CHUNK)
    x_ptrs = x_ptr + row.to(tl.int64) * D + offs
    x = tl.load(x_ptrs, mask=offs < D, other=0.0).to(tl.float32)
    x += tl.load(scale_ptr + row) * u
    tl.store(x_ptrs, x.to(x_ptr.dtype.element_ty), mask=offs < D)


def _launch_neftune(
    x: Tensor,  # (M, D) contiguous, added to
    scale: Tensor,  # (M,) float32
    seed: Tensor,  # (1,) int64
) -> None:
    M, D = x.shape
    assert x.is_contiguous()
    # as dropout's: a thread's values are those of its words, and nothing goes through shared memory
    chunk = 32 * NUM_WARPS * VECTORS * VECTOR_BYTES // x.element_size()
    programs_per_row = cdiv(D, chunk)
    if x.numel() > 0:
        launch(
            _neftune_kernel,
            (M * programs_per_row,),
            x_ptr=x,
            scale_ptr=scale,
            seed_ptr=seed,
            D=D,
            programs_per_row=programs_per_row,
            SITE=SITE,
            CHUNK=chunk,
            num_warps=NUM_WARPS,
            # the product and the sum round apart, as torch's do: the reference bit for bit
            enable_fp_fusion=False,
        )


def neftune_(
    x: Tensor,  # (M, D) contiguous; added to
    scale: Tensor,  # (M,) float32
    seed: Tensor,  # (1,) int64
) -> Tensor:  # x
    """Add uniform noise to every row, at most its scale.

        x[m, k] += scale[m] u(seed, m, k)

    Raises:
        ValueError: shapes, dtypes, strides or devices do not fit.
    """
    check_dtype("x", x.dtype)
    if x.dim() != 2:
        raise ValueError(f"x must be a matrix: got shape {tuple(x.shape)}")
    check_is_contiguous("x", x)
    check_is("the scale", scale, torch.float32, (x.shape[0],))
    check_is_contiguous("the scale", scale)
    check_seed(seed)
    check_one_device({"x": x, "the scale": scale, "the seed": seed})
    if x.device.type == "cpu":
        return x.copy_(neftune_reference(x, scale, seed))
    _launch_neftune(x, scale, seed)
    return x
