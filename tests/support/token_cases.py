"""The inputs on which the kernels of a pass for one token are tried, and what they return."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from support.layer_cases import generator_of
from support.nf4_cases import INTERPRETED_DTYPES, WeightCase, random_weight, to_device
from torch import Tensor

from kernels.lora_extension import Update
from kernels.low_rank import LowRank, low_rank_of
from kernels.rope_tables import RopeTables
from kernels.token_attention import TokenScores
from kernels.token_heads import HeadNorms, Places

EPS = 1e-5


@dataclass(frozen=True)
class NormCase:
    """Rows to normalize and to multiply by A."""

    num_rows: int
    width: int
    num_ranks: int
    dtype: torch.dtype
    has_delta: bool = True
    offset: float = 0.0
    is_centred: bool = False

    def __str__(self) -> str:
        words = [f"M{self.num_rows}-D{self.width}-P{self.num_ranks}-{str(self.dtype)[6:]}"]
        return " ".join(
            words
            + ["delta"] * self.has_delta
            + ["offset"] * bool(self.offset)
            + ["centred"] * self.is_centred
        )

    def inputs(self, device: torch.device) -> tuple[Any, ...]:
        drawn = generator_of(self)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=drawn).to(self.dtype).to(device)

        x, delta = draw(self.num_rows, self.width), draw(self.num_rows, self.width)
        weight, A = draw(self.width), draw(self.num_ranks, self.width) * self.width**-0.5
        x += self.is_centred
        delta = delta if self.has_delta else None
        return x, delta, weight, EPS, self.offset, A, self.is_centred


@dataclass(frozen=True)
class GluCase:
    """Gates and ups of rows, and A."""

    num_rows: int
    width: int
    num_ranks: int
    dtype: torch.dtype
    activation: Any = "silu"

    def __str__(self) -> str:
        size = f"M{self.num_rows}-F{self.width}-P{self.num_ranks}"
        return f"{size}-{str(self.dtype)[6:]}-{self.activation}"

    def inputs(self, device: torch.device) -> tuple[Any, ...]:
        drawn = generator_of(self)
        # some exceed 7
        gate_up = 4 * torch.randn(self.num_rows, 2 * self.width, generator=drawn)
        A = torch.randn(self.num_ranks, self.width, generator=drawn) * self.width**-0.5
        return gate_up.to(self.dtype).to(device), self.activation, A.to(self.dtype).to(device)


@dataclass(frozen=True)
class LinearCase:
    """A weight for a few rows, which of its members have an update, and whether it has a bias."""

    weight: WeightCase
    num_rows: int
    dtype: torch.dtype
    rank: int = 0
    updated: tuple[int, ...] = ()
    has_bias: bool = False

    def __str__(self) -> str:
        words = [f"M{self.num_rows}-{self.weight}-{str(self.dtype)[6:]}"]
        words += [f"r{self.rank} of {self.updated}"] * bool(self.rank) + ["bias"] * self.has_bias
        return " ".join(words)

    def low_rank(self, device: torch.device) -> LowRank | None:
        if not self.rank:
            return None
        drawn, rows = generator_of((self, "update")), self.weight.rows
        updates, num_rows = [], 0
        for index, member in enumerate(self.updated):
            start = sum(rows[:member])
            columns = slice(index * self.rank, (index + 1) * self.rank)
            own = slice(num_rows, num_rows + rows[member])
            updates.append(Update(slice(start, start + rows[member]), columns, own, 0.5 + index))
            num_rows += rows[member]
        lora_A = torch.randn(len(updates) * self.rank, self.weight.in_features, generator=drawn)
        lora_B = torch.randn(num_rows, self.rank, generator=drawn)
        return low_rank_of(lora_A.to(device), lora_B.to(device), updates, rows, self.dtype)

    def inputs(self, device: torch.device) -> tuple[Any, ...]:
        drawn, low_rank = generator_of(self), self.low_rank(device)
        x = torch.randn(self.num_rows, self.weight.in_features, generator=drawn)
        bias = torch.randn(sum(self.weight.rows), generator=drawn).to(self.dtype).to(device)
        h = None
        if low_rank is not None:
            h = torch.randn(self.num_rows, low_rank.A.shape[0], generator=drawn)
            h = h.to(self.dtype).to(device)
        weight = to_device(random_weight(self.weight), device)
        x = x.to(self.dtype).to(device)
        return x, weight, bias if self.has_bias else None, h, low_rank


@dataclass(frozen=True)
class HeadsCase:
    """New tokens of sequences, with the heads and the cache that they go to."""

    places: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    capacity: int = 200
    has_norms: bool = False
    rotary_dim: int | None = None  # of the dimensions that turn; None: all
    is_interleaved: bool = False
    scales_queries: bool = False

    def __str__(self) -> str:
        size = f"H{self.num_heads}+{self.num_kv_heads}-E{self.head_dim}-at{self.places}"
        words = [f"{size}-{str(self.dtype)[6:]}"] + ["norms"] * self.has_norms
        words += [f"r{self.rotary_dim}"] * bool(self.rotary_dim)
        words += ["interleaved"] * self.is_interleaved + ["scaled"] * self.scales_queries
        return " ".join(words)

    def cache(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Keys and values; those behind a sequence's tokens are NaN."""
        drawn = generator_of((self, "cache"))
        shape = (len(self.places), self.num_kv_heads, self.capacity, self.head_dim)
        keys, values = (torch.randn(shape, generator=drawn).to(self.dtype) for _ in range(2))
        for sequence, place in enumerate(self.places):
            for part in (keys, values):
                part[sequence, :, place + 1 :] = float("nan")
        return keys.to(device), values.to(device)

    def place(self, device: torch.device) -> Tensor:
        return torch.tensor(self.places, device=device)

    def inputs(self, device: torch.device) -> tuple[Any, ...]:
        drawn = generator_of(self)
        num_heads = self.num_heads + 2 * self.num_kv_heads
        qkv = torch.randn(len(self.places), num_heads * self.head_dim, generator=drawn)
        num_pairs = (self.rotary_dim or self.head_dim) // 2
        angles = torch.randn(self.capacity + 7, num_pairs, generator=drawn).to(device)
        factor = 1 + torch.rand(self.capacity + 7, generator=generator_of((self, "factor")))
        factor = factor.to(device) if self.scales_queries else None
        tables = RopeTables(angles.cos(), angles.sin(), self.is_interleaved, factor)
        weights = torch.randn(2, self.head_dim, generator=drawn).to(self.dtype).to(device)
        norms = HeadNorms(weights[0], weights[1], EPS, 1.0) if self.has_norms else None
        keys, values = self.cache(device)
        # another row of the tables than of the cache
        places = Places(self.place(device), self.place(device) + 7)
        qkv = qkv.to(self.dtype).to(device)
        return qkv, keys, values, places, tables, norms


@dataclass(frozen=True)
class AttentionCase:
    """Queries of the newest tokens, the cache, and the scores."""

    heads: HeadsCase
    cap: float | None = None
    window: int | None = None
    num_ranks: int = 0
    has_sinks: bool = False

    def __str__(self) -> str:
        words = [f"{self.heads} cap{self.cap} window{self.window} P{self.num_ranks}"]
        return " ".join(words + ["sinks"] * self.has_sinks)

    def inputs(self, device: torch.device) -> tuple[Any, ...]:
        drawn, heads = generator_of(self), self.heads
        query = torch.randn(len(heads.places), heads.num_heads, heads.head_dim, generator=drawn)
        width = heads.num_heads * heads.head_dim
        A = torch.randn(self.num_ranks, width, generator=drawn) * width**-0.5
        sinks = 2 * torch.randn(heads.num_heads, generator=generator_of((self, "sinks")))
        sinks = sinks.to(heads.dtype).to(device) if self.has_sinks else None
        scores = TokenScores(heads.head_dim**-0.5, self.cap, self.window, sinks)
        keys, values = heads.cache(device)
        query, A = query.to(heads.dtype).to(device), A.to(heads.dtype).to(device)
        return query, keys, values, heads.place(device), scores, A if self.num_ranks else None


Case = NormCase | GluCase | LinearCase | HeadsCase | AttentionCase


def results(case: Case, function: Callable[..., Any], device: torch.device) -> dict[str, Tensor]:
    """Everything that a function returns for a case, and what it wrote to a cache."""
    inputs = case.inputs(device)
    found = function(*inputs)
    found = found if isinstance(found, tuple) else (found,)
    named = {str(index): tensor for index, tensor in enumerate(found) if tensor is not None}
    if isinstance(case, HeadsCase):
        named |= {"keys": inputs[1], "values": inputs[2]}
    return {name: tensor.cpu().contiguous() for name, tensor in named.items()}


_WEIGHTS = (WeightCase((64,), 512), WeightCase((32, 64, 32), 256, double_quant=False))


def _tiny() -> dict[str, list[Any]]:
    cases: dict[str, list[Any]] = {name: [] for name in ("norm", "glu", "linear", "heads", "attn")}
    for dtype in INTERPRETED_DTYPES:
        cases["norm"] += [NormCase(2, 100, 3, dtype), NormCase(1, 64, 1, dtype, False, 1.0)]
        cases["norm"].append(NormCase(2, 100, 3, dtype, is_centred=True))
        cases["glu"] += [
            GluCase(2, 2500, 3, dtype),
            GluCase(1, 96, 1, dtype, "gelu_tanh"),
            GluCase(1, 96, 1, dtype, "clamped_swish"),
        ]
        heads = HeadsCase((5, 130), 4, 2, 24, dtype)
        wide = HeadsCase((0, 63, 64), 3, 3, 16, dtype, has_norms=True)
        cases["heads"] += [
            heads,
            wide,
            HeadsCase((5, 130), 4, 2, 24, dtype, has_norms=True, rotary_dim=10),
            HeadsCase((5,), 4, 2, 24, dtype, is_interleaved=True),
            HeadsCase((5,), 4, 2, 24, dtype, rotary_dim=12, is_interleaved=True),
            HeadsCase((5, 130), 4, 2, 24, dtype, scales_queries=True),
        ]
        cases["attn"] += [
            AttentionCase(heads),
            AttentionCase(heads, cap=2.0, window=70, num_ranks=2),
            AttentionCase(wide, window=64, num_ranks=1),
            # more queries share a key than a product has rows, and a window is shorter than a split
            AttentionCase(HeadsCase((0, 70), 20, 1, 24, dtype), window=3, num_ranks=4),
            AttentionCase(wide, window=64, num_ranks=1, has_sinks=True),
            AttentionCase(HeadsCase((0, 70), 20, 1, 24, dtype), cap=2.0, has_sinks=True),
        ]
        if dtype != torch.float32:
            cases["linear"] += [
                LinearCase(_WEIGHTS[0], 2, dtype, 8, (0,), True),
                LinearCase(_WEIGHTS[1], 9, dtype, 20, (0, 2)),
                LinearCase(_WEIGHTS[1], 1, dtype, has_bias=True),
            ]
    return cases


TINY = _tiny()
