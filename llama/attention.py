"""Causal grouped-query attention, forward and backward, by the fastest exact kernel there is.

    mixed = softmax(scale q k^T + mask) v

    mask    token i sees j <= i, with a window of W tokens j > i - W, and only its own sample
    sink    a score of a head beside those, which has no value, in families that have them

On a GPU torch chooses between the kernels of cuDNN and FlashAttention. Each keeps one number a row
and head for the backward pass, not the scores. torch holds that number in an autograd graph, the
only one in a layer's passes. `kernels.masked_attention` does the rest, for which torch has no
kernel or needs a mask or scores of T^2 numbers: capped scores, windows shorter than the rows,
sinks, rows of several samples, heads wider than 256, float32, and every dtype on a GPU before
compute capability 8.0. Its sums have a fixed order, so in deterministic runs it takes the place of
torch's slower kernel that has one.

On the meta device this file allocates what torch allocates on a GPU, and computes nothing.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.device import Properties, properties
from kernels.masked_attention import masked_attention
from kernels.masked_attention_backward import masked_attention_backward
from kernels.masked_attention_mask import Samples
from kernels.masked_attention_tiles import check_head_dim
from llama.config import LlamaConfig

# the first GPUs that FlashAttention has a kernel for, and those on which torch prefers cuDNN's
FLASH_CAPABILITY = (8, 0)
CUDNN_CAPABILITY = (9, 0)
# where torch's ordered backward pass takes longer than ours, by the major number: on an H200 both
# passes of ours take 17 % less time at 4 x 2,048 tokens, 31 % at 8,192; measured for this width
ORDERED_MAJOR = 9
ORDERED_HEAD_DIM = 128
# the widest heads that these kernels take
FLASH_HEAD_DIM = 256
# rows and columns of FlashAttention's tiles, to which its scratch memory is rounded up
FLASH_ROWS, FLASH_COLUMNS = 128, 32


class Scores(NamedTuple):
    """How a layer computes its attention scores."""

    scale: float  # of q k^T
    cap: float | None  # of softcap(scale q k^T); None: the scores are not capped
    window: int | None  # tokens that a token sees, itself included; None: all before it


class Mixed(NamedTuple):
    """The result of an attention and what its backward pass needs."""

    inputs: tuple[Tensor, Tensor, Tensor]  # q (B, H, T, head_dim), k and v (B, H_kv, T, head_dim)
    # (B, H, T, head_dim), with the graph to the inputs if torch made it and it has a backward pass
    output: Tensor
    scores: Scores
    lse: Tensor | None  # (B, H, T) float32; None where the graph holds it, or nothing needs it
    is_masked: bool  # computed by kernels.masked_attention, not by torch
    samples: Samples | None


def attention(
    query: Tensor,  # (B, H, T, head_dim)
    key: Tensor,  # (B, H_kv, T, head_dim)
    value: Tensor,
    scores: Scores,
    has_backward: bool,
    samples: Samples | None = None,
    sinks: Tensor | None = None,  # (H,)
) -> Mixed:
    """Let every token mix the values of itself and of those before it.

    Args:
        has_backward: keep what `attention_backward` needs.
        samples: where each token lies, if a row holds several.
        sinks: the backward pass needs none: lse counts them.
    """
    num_tokens, (scale, cap, window) = query.shape[2], scores
    is_windowed = window is not None and num_tokens > window
    is_plain = cap is None and not is_windowed and samples is None and sinks is None
    is_by_torch = query.device.type == "cpu" or torch_attends(
        properties(query.device), query.dtype, query.shape[3]
    )
    if not (is_plain and is_by_torch):
        output, lse = masked_attention(query, key, value, scale, cap, window, samples, sinks)
        return Mixed((query, key, value), output, scores, lse, True, samples)
    if query.device.type == "meta":
        output, lse = _forward_sizes(query)
        kept = lse if has_backward else None
        return Mixed((query, key, value), output, scores, kept, False, None)
    with torch.set_grad_enabled(has_backward):
        inputs = (query.detach(), key.detach(), value.detach())
        for tensor in inputs:
            tensor.requires_grad_(has_backward)
        output = F.scaled_dot_product_attention(
            *inputs, is_causal=num_tokens > 1, scale=scale, enable_gqa=True
        )
    return Mixed(inputs, output, scores, None, False, None)


def torch_attends(gpu: Properties, dtype: torch.dtype, head_dim: int) -> bool:
    """Tell whether plain causal attention is torch's: whether it has a fast kernel for that.

    The kernels of cuDNN and FlashAttention write no scores out. Where queries share the heads of
    keys, the only other way in torch expands the keys and writes T^2 scores out.
    """
    is_known = dtype in (torch.bfloat16, torch.float16) and head_dim <= FLASH_HEAD_DIM
    has_kernel = is_known and gpu.capability >= FLASH_CAPABILITY
    is_ordered = torch.are_deterministic_algorithms_enabled()
    is_slower = gpu.capability[0] == ORDERED_MAJOR and head_dim <= ORDERED_HEAD_DIM
    return has_kernel and not (is_ordered and is_slower)


def check_heads(
    config: LlamaConfig,
    dtype: torch.dtype,
    device: torch.device,
    planned: Properties | None = None,
) -> None:
    """Refuse a model with heads that its GPU has no room for; a CPU has room for any.

    Args:
        planned: the GPU of a plan, where that is not this machine's.

    Raises:
        ValueError: the heads of a layer are too wide for this dtype on this GPU.
    """
    if device.type == "cpu":
        return
    gpu = planned or properties(device)
    for heads in config.distinct_heads:
        check_head_dim(heads.head_dim, dtype, gpu)


def attention_backward(mixed: Mixed, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of query, key and value from that of the output."""
    if mixed.is_masked:
        assert mixed.lse is not None
        scale, cap, window = mixed.scores
        return masked_attention_backward(
            grad, *mixed.inputs, mixed.output, mixed.lse, scale, cap, window, mixed.samples
        )
    if grad.device.type == "meta":
        return _backward_sizes(*mixed.inputs)
    # in this thread: autograd's own thread does not know the pool that a pass allocates from, and
    # would allocate from another
    with torch.autograd.set_multithreading_enabled(False):
        query, key, value = torch.autograd.grad(mixed.output, mixed.inputs, grad)
    return query, key, value


def _heads_beside(like: Tensor, num_heads: int) -> Tensor:
    """Allocate (B, num_heads, T, head_dim) heads; the heads of a token lie side by side."""
    B, _, T, head_dim = like.shape
    return like.new_empty(B, T, num_heads, head_dim).transpose(1, 2)


def _forward_sizes(query: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate on the meta device what torch's forward pass allocates on a GPU."""
    B, H, T, _ = query.shape
    return _heads_beside(query, H), query.new_empty(B, H, T, dtype=torch.float32)


def _backward_sizes(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate on the meta device what torch's backward pass allocates on a GPU.

    The gradient of the queries is added up in float32: by FlashAttention in rounded tiles and, in
    deterministic runs, in as many parts as keep the GPU busy. The gradients of shared keys and
    values are written for every query head and added up after the kernel. Sources: for
    FlashAttention `mha_bwd` of torch 2.11; for cuDNN the bytes that an H200 allocated for heads of
    64 to 256.
    """
    B, H, T, head_dim = query.shape
    gpu, is_deterministic = properties(query.device), torch.are_deterministic_algorithms_enabled()
    num_rows, num_columns, num_parts = T, head_dim, 1
    if is_deterministic or gpu.capability < CUDNN_CAPABILITY:
        num_rows += -T % FLASH_ROWS
        num_columns += -head_dim % FLASH_COLUMNS
    if is_deterministic:
        num_parts = -(-gpu.num_multiprocessors // (B * H))
    H_kv = key.shape[1]
    grads = (_heads_beside(query, H), _heads_beside(key, H_kv), _heads_beside(value, H_kv))
    scratch = [
        query.new_empty(B, H, num_rows, dtype=torch.float32),
        query.new_empty(num_parts, B, num_rows, H, num_columns, dtype=torch.float32),
    ]
    if H_kv != H:
        scratch += [_heads_beside(query, H) for _ in range(2)]
    return grads
