"""The heads on which attention under a mask is tried: in the interpreter, on a CPU and on a GPU."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from support.layer_cases import CPU, contiguous, generator_of
from support.nf4_cases import INTERPRETED_DTYPES
from torch import Tensor

from kernels.masked_attention_mask import Samples
from kernels.softcap import ERROR


@dataclass(frozen=True)
class AttentionCase:
    """Heads of queries, keys and values; the queries are the last of all tokens."""

    batch: int
    num_heads: int
    num_kv_heads: int
    num_queries: int
    num_keys: int
    head_dim: int
    window: int | None
    dtype: torch.dtype
    scale: float = 0.5
    # scores of standard deviation 1 to 8 reach well into the bend
    cap: float | None = 5.0
    # lengths of a row's samples; empty: it is one
    lengths: tuple[int, ...] = ()
    has_sinks: bool = False

    def __str__(self) -> str:
        heads = f"B{self.batch}-H{self.num_heads}+{self.num_kv_heads}x{self.head_dim}"
        tokens = f"T{self.num_queries}of{self.num_keys}-W{self.window}"
        packed = f"-{'+'.join(map(str, self.lengths))}" if self.lengths else ""
        words = "" if self.cap else "uncapped-"
        words += "sinks-" * self.has_sinks
        return f"{heads}-{tokens}{packed}-{words}{str(self.dtype)[6:]}"

    def samples(self, device: torch.device = CPU) -> Samples | None:
        """Lay the samples in each row, in another order in every second one."""
        if not self.lengths:
            return None
        orders = [self.lengths[:: 1 if row % 2 == 0 else -1] for row in range(self.batch)]
        positions = [torch.cat([torch.arange(n) for n in order]) for order in orders]
        remaining = [torch.cat([torch.arange(n).flip(0) for n in order]) for order in orders]
        return Samples(*(torch.stack(x).int().to(device) for x in (positions, remaining)))

    def sinks(self, device: torch.device = CPU) -> Tensor | None:
        """Draw sinks below, among and above the largest scores of their heads."""
        if not self.has_sinks:
            return None
        drawn = torch.randn(self.num_heads, generator=generator_of((self, "sinks")))
        return (4 * drawn).to(device, self.dtype)

    @property
    def has_backward(self) -> bool:
        return self.num_queries == self.num_keys


def attention_cases(
    shapes: list[tuple[int, int, int, int, int, int, int | None]],
    dtypes: tuple[torch.dtype, ...],
) -> list[AttentionCase]:
    return [AttentionCase(*shape, dtype) for dtype in dtypes for shape in shapes]


# one token; shared heads that fill no vector; tiles and a rest, in a window within a tile and
# across tiles, and of one token; a token after others
TINY_ATTENTIONS = attention_cases(
    [
        (1, 1, 1, 1, 1, 2, None),
        (2, 4, 2, 5, 5, 12, None),
        (1, 2, 1, 70, 70, 16, None),
        (1, 3, 1, 70, 70, 16, 9),
        (1, 2, 2, 130, 130, 16, 67),
        (1, 1, 1, 5, 5, 16, 1),
        (2, 4, 2, 1, 70, 12, None),
        (2, 4, 2, 1, 70, 12, 9),
    ],
    INTERPRETED_DTYPES,
)


# the same without a cap, and samples of one token, of a tile and more, and in windows
TINY_ATTENTIONS += [replace(case, cap=None) for case in TINY_ATTENTIONS if case.num_queries > 5]
TINY_ATTENTIONS += [
    replace(case, cap=cap, window=window, batch=2, lengths=(1, 3, 66))
    for case in TINY_ATTENTIONS
    if case.num_queries == 70 and case.window is None and case.cap is not None
    for cap, window in ((None, None), (None, 9), (5.0, None))
]
# all kinds of masks with sinks
TINY_ATTENTIONS += [
    replace(case, has_sinks=True)
    for case in TINY_ATTENTIONS
    if case.num_queries in (1, 70) and (case.lengths or case.window == 9)
]


def attention_inputs(case: AttentionCase, device: torch.device = CPU) -> dict[str, Tensor]:
    """Draw heads as they lie in a buffer of q, k and v, and a gradient as a layer has it."""
    generator = generator_of(case)
    counts = {"query": case.num_heads, "key": case.num_kv_heads, "value": case.num_kv_heads}
    buffer = torch.randn(
        case.batch, case.num_keys, sum(counts.values()), case.head_dim, generator=generator
    )
    buffer[:, :, : case.num_heads] *= 8 / case.head_dim**0.5
    # tokens differ in how large their scores are
    buffer *= 2.0 ** -torch.arange(case.num_keys).remainder(4)[:, None, None]
    heads = buffer.to(device, case.dtype).transpose(1, 2).split(list(counts.values()), dim=1)
    inputs = dict(zip(counts, heads, strict=True))
    inputs["query"] = inputs["query"][:, :, -case.num_queries :]
    grad = torch.randn(
        case.batch, case.num_queries, case.num_heads, case.head_dim, generator=generator
    )
    return inputs | {"grad": grad.to(device, case.dtype).transpose(1, 2)}


def attention_results(
    case: AttentionCase,
    # (query, key, value, scale, cap, window, samples, sinks) -> out, lse
    attend: Callable[..., Any],
    # (grad, query, key, value, out, lse, and those but the sinks) -> grad_q, grad_k, grad_v
    attend_backward: Callable[..., Any],
    device: torch.device = CPU,
) -> dict[str, Tensor]:
    """Run an attention forward, and back where every token is a query."""
    inputs = attention_inputs(case, device)
    grad = inputs.pop("grad")
    numbers = (case.scale, case.cap, case.window, case.samples(device))
    out, lse = attend(*inputs.values(), *numbers, case.sinks(device))
    results = {"out": out, "lse": lse}
    if case.has_backward:
        grads = attend_backward(grad, *inputs.values(), out, lse, *numbers)
        results |= dict(zip(("grad_q", "grad_k", "grad_v"), grads, strict=True))
    return contiguous(results)


def _scores_of_torch(case: AttentionCase, query: Tensor, key: Tensor) -> Tensor:
    """Cap the scores of each query head, and leave out what it does not see; the last column is
    the sinks."""
    scores = query @ key.mT * case.scale
    if case.cap is not None:
        scores = torch.tanh(scores / case.cap) * case.cap
    positions = torch.arange(case.num_keys)
    distance = positions[-case.num_queries :, None] - positions
    is_seen = (distance >= 0) & (distance < (case.window or case.num_keys))
    samples = case.samples()
    if samples is not None:
        # a new sample begins wherever positions start again
        number = (samples.positions == 0).cumsum(dim=1)
        is_seen = is_seen & (number[:, None, :, None] == number[:, None, None, :])
    scores = scores.masked_fill(~is_seen, float("-inf"))
    sinks = case.sinks()
    lowest = scores.new_full((case.num_heads,), float("-inf"))
    column = lowest if sinks is None else sinks.to(scores.dtype)
    column = column[None, :, None, None].expand(*scores.shape[:3], 1)
    return torch.cat((scores, column), dim=-1)


def attention_of_torch(case: AttentionCase, dtype: torch.dtype) -> dict[str, Tensor]:
    """Attend as transformers does, in a dtype with the softmax in float32 at least; autograd
    back."""
    inputs = {name: tensor.to(dtype) for name, tensor in attention_inputs(case).items()}
    grad = inputs.pop("grad")
    leaves = [tensor.requires_grad_(case.has_backward) for tensor in inputs.values()]
    num_shared = case.num_heads // case.num_kv_heads
    key, value = (x.repeat_interleave(num_shared, dim=1) for x in leaves[1:])
    scores = _scores_of_torch(case, leaves[0], key)
    wide = scores if dtype == torch.float64 else scores.float()
    out = wide.softmax(dim=-1)[..., :-1].to(dtype) @ value
    results = {"out": out, "lse": wide.logsumexp(dim=-1)}
    if case.has_backward:
        grads = torch.autograd.grad(out, leaves, grad)
        results |= dict(zip(("grad_q", "grad_k", "grad_v"), grads, strict=True))
    return contiguous(results)


def allowances(case: AttentionCase) -> dict[str, float]:
    """Bound what the error of a score does to each result: ERROR of the cap, where it is capped.

    A probability compares two scores, so both change it by a share of itself, and the slope and
    delta err by such a share again; magnitudes that are summed without a sign bound the rest. That
    of a score without a cap is the rounding of its lse, as large a number as the score, which torch
    does without: a plain softmax subtracts the largest score first.
    """
    inputs = {name: tensor.double() for name, tensor in attention_inputs(case).items()}
    num_shared = case.num_heads // case.num_kv_heads
    query, grad = inputs["query"], inputs["grad"].abs()
    key, value = (inputs[name].repeat_interleave(num_shared, dim=1) for name in ("key", "value"))
    scores = _scores_of_torch(case, query, key)
    p = scores.softmax(dim=-1)[..., :-1]
    grad_p = grad @ value.abs().mT
    grad_s = case.scale * p * (grad_p + (grad_p * p).sum(dim=-1, keepdim=True))
    magnitudes = {
        "out": p @ value.abs(),
        "grad_q": grad_s @ key.abs(),
        "grad_k": (grad_s.mT @ query.abs()).unflatten(1, (-1, num_shared)).sum(dim=2),
        "grad_v": (p.mT @ grad).unflatten(1, (-1, num_shared)).sum(dim=2),
    }
    error, slope = (4 * case.cap * ERROR, 2 * ERROR) if case.cap else (0.0, 0.0)
    if case.cap is None:
        largest = float(scores[scores.isfinite()].abs().max())
        # of the score, of lse and of their difference, half a unit each, in p and in delta
        error = 3 * largest * torch.finfo(torch.float32).eps
    found = {name: (error + slope) * float(x.max()) for name, x in magnitudes.items()}
    return found | {"lse": error / 4 if case.cap else error}
