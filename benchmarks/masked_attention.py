"""Measure attention under a mask, forward and back: ours beside what torch has for it.

    python -m benchmarks masked_attention --json benchmarks/results/masked_attention.h100.json

    packed    rows of several samples, whose lengths are drawn around 200 tokens
    window    one sample a row, of which a token sees the last 512
    capped    one sample a row, heads of 256, scores capped at 50, as in Gemma-2's layers

flex is FlexAttention compiled for its mask, which is made beforehand; varlen torch's attention over
samples of different lengths, with keys and values repeated for the query heads that share them;
causal what torch takes where there is no mask, as the size of what is avoided. Both passes are one
call, through autograd where they are torch's. The limit is the FLOPs of the pairs that see each
other: 4 a value and pair forward and 10 back.
"""

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.command import Candidate, Machine, Result, Work, limit_row, main, measured_rows
from benchmarks.measure import Operation, num_input_sets
from benchmarks.tables import Row, aligned, masked_attention_table
from kernels.masked_attention import masked_attention
from kernels.masked_attention_backward import masked_attention_backward
from kernels.masked_attention_mask import Samples
from llama.model import samples_of

SEED = 0


class Case(NamedTuple):
    """Heads of a layer, and the mask they are under."""

    mode: str
    layer: str
    batch: int
    tokens: int
    heads: tuple[int, int, int]  # of queries, of keys and values, and their width
    window: int | None = None
    cap: float | None = None
    sample_tokens: int | None = None  # of a sample, about


CASES = (
    Case("packed", "llama-3-8b.self_attn", 4, 2048, (32, 8, 128), sample_tokens=200),
    Case("window", "llama-3-8b.self_attn", 4, 2048, (32, 8, 128), window=512),
    Case("capped", "gemma-2-9b.self_attn", 4, 2048, (16, 8, 256), cap=50.0),
)


def draw_lengths(num_tokens: int, about: int, generator: torch.Generator) -> list[int]:
    """Draw samples that fill a row, lengths log-normal around a number."""
    lengths: list[int] = []
    while (room := num_tokens - sum(lengths)) > 0:
        drawn = about * math.exp(0.4 * float(torch.randn((), generator=generator)))
        lengths.append(min(max(int(drawn), 8), room))
    return lengths


def positions_of(case: Case) -> Tensor | None:  # (B, T) int64
    """Lay samples in every row; None where a row is one."""
    if case.sample_tokens is None:
        return None
    generator = torch.Generator().manual_seed(SEED)
    rows = [draw_lengths(case.tokens, case.sample_tokens, generator) for _ in range(case.batch)]
    return torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in rows])


def num_pairs(case: Case, positions: Tensor | None) -> int:
    """Count the tokens that see each other, of all rows."""
    before = torch.arange(case.tokens).expand(case.batch, -1) if positions is None else positions
    return int((before + 1).clamp(max=case.window or case.tokens).sum())


class Inputs(NamedTuple):
    """One set: heads as they lie in a buffer of q, k and v, and the gradient of the result."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor


def draw_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    num_heads, num_kv_heads, width = case.heads
    counts = (num_heads, num_kv_heads, num_kv_heads)
    buffer = torch.randn(case.batch, case.tokens, sum(counts), width, device=device).to(dtype)
    query, key, value = buffer.transpose(1, 2).split(counts, dim=1)
    grad = torch.randn(case.batch, case.tokens, num_heads, width, device=device).to(dtype)
    return Inputs(query, key, value, grad.transpose(1, 2))


def ours(case: Case, samples: Samples | None, given: Inputs) -> None:
    query, key, value, grad = given
    scale, cap, window = case.heads[2] ** -0.5, case.cap, case.window
    with torch.no_grad():
        out, lse = masked_attention(query, key, value, scale, cap, window, samples)
        masked_attention_backward(grad, query, key, value, out, lse, scale, cap, window, samples)


def through_autograd(attend: Callable[[Tensor, Tensor, Tensor], Tensor], given: Inputs) -> None:
    """Run an attention of torch's forward and back."""
    leaves = [tensor.detach().requires_grad_() for tensor in given[:3]]
    torch.autograd.grad(attend(*leaves), leaves, given.grad)


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def flex(case: Case, positions: Tensor | None, device: torch.device) -> Callable[..., Tensor]:
    """Compile FlexAttention for a case's mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    before = torch.arange(case.tokens).expand(case.batch, -1) if positions is None else positions
    reach = (before if case.window is None else before.clamp(max=case.window - 1)).to(device)

    def is_seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j <= reach[b, i])

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return score if case.cap is None else case.cap * torch.tanh(score / case.cap)

    sizes = (case.batch, None, case.tokens, case.tokens)
    mask = create_block_mask(is_seen, *sizes, device=device)
    attend = torch.compile(flex_attention, dynamic=False)
    score_mod = None if case.cap is None else capped
    return partial(attend, block_mask=mask, score_mod=score_mod, enable_gqa=True)


def varlen(case: Case, positions: Tensor, device: torch.device) -> Callable[..., Tensor]:
    """Bind torch's attention over samples of different lengths to where a case's begin."""
    from torch.nn.attention.varlen import varlen_attn

    starts = (positions.flatten() == 0).nonzero().squeeze(1)
    bounds = torch.cat((starts, torch.tensor([positions.numel()]))).int()
    longest = int(bounds.diff().max())
    bounds, num_shared = bounds.to(device), case.heads[0] // case.heads[1]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        k, v = (x.repeat_interleave(num_shared, dim=1) for x in (k, v))
        # a window as wide as may be to the left, of nothing to the right
        out = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0))
        assert isinstance(out, Tensor)
        return out.unflatten(0, (case.batch, case.tokens)).transpose(1, 2)

    return attend


def measure_case(case: Case, dtype: torch.dtype, machine: Machine) -> list[Row]:
    """Measure one mask, forward and back."""
    num_heads, _, width = case.heads
    positions = positions_of(case)
    m = case.batch * case.tokens
    num_flops = 14 * num_heads * width * num_pairs(case, positions)
    num_bytes = 4 * m * sum(case.heads[:2]) * width * dtype.itemsize
    work = Work(case.mode, case.layer, m, num_heads, width, dtype, num_bytes, num_flops)
    num_sets = num_input_sets(num_bytes, 4 * num_bytes, machine.device)
    sets = [draw_inputs(case, dtype, machine.device) for _ in range(num_sets)]
    samples = None
    if positions is not None:
        samples = Samples(*(x.to(machine.device) for x in samples_of(positions)))

    def calls(function: Callable[..., Any], *bound: Any) -> list[Callable[[], Any]]:
        return [partial(function, *bound, given) for given in sets]

    candidates = [Candidate(work, "ours", Operation(calls(ours, case, samples)))]
    torchs = {"flex": flex(case, positions, machine.device)}
    if positions is not None:
        torchs["varlen"] = varlen(case, positions, machine.device)
    if case.cap is None:
        torchs["causal"] = causal
    candidates += [
        # autograd runs backward on streams of its own, which a graph would not hold
        Candidate(work, name, Operation(calls(through_autograd, attend), captured=False))
        for name, attend in torchs.items()
    ]
    return [limit_row(work, machine), *measured_rows(candidates, machine)]


def run(machine: Machine) -> Result:
    rows: list[Row] = []
    for case in CASES:
        rows += measure_case(case, torch.bfloat16, machine)
        print(f"measured {case.mode}", flush=True)
    return Result(rows, {}, aligned(*masked_attention_table(rows)))


if __name__ == "__main__":
    sys.exit(main("masked_attention", run))
