"""The sizes of a micro-step: what `llama/memory_plan.py` and `llama/step_time.py` reckon with.

M = B T rows, D hidden_size, F intermediate_size
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from llama.config import LlamaConfig
from lora.config import LoRAConfig
from lora.linear_group import tail_columns


@dataclass(frozen=True)
class Group:
    """A linear group's sizes: (N, K) with the longest tail that it has in a layer, and the numbers
    of its adapter in all layers."""

    N: int
    K: int
    tail: int
    num_adapted: int


@dataclass(frozen=True)
class Workload:
    """What a plan is for.

    Attributes:
        frozen_bytes: of the frozen weights as they lie on the device.
        moment_bytes: what both moments of a number of the adapter take of the device.
        tokens: of each row of the batch.
        sample_tokens: where rows hold several samples, of that which a token is in, on average.
    """

    config: LlamaConfig
    lora: LoRAConfig
    frozen_bytes: int
    moment_bytes: float
    batch: int
    tokens: int
    dtype: torch.dtype
    sample_tokens: float | None = None

    @property
    def is_masked(self) -> bool:
        """Whether attention is `kernels.masked_attention`'s, at least in some layers."""
        return self.config.attn_logit_softcapping is not None or self.sample_tokens is not None

    @property
    def M(self) -> int:
        return self.batch * self.tokens

    def _group(self, K: int, module: str, **rows: int) -> Group:
        """Size a group from its members' rows by name."""
        tail = num_adapted = 0
        for layer in range(self.config.num_hidden_layers):
            sizes = {n: self.lora.update_size(f"model.layers.{layer}.{module}.{n}") for n in rows}
            ranks = {name: size.rank for name, size in sizes.items() if size is not None}
            # every update has room for the largest
            room = max(ranks.values(), default=0)
            tail = max(tail, tail_columns(room * len(ranks)))
            num_adapted += room * sum(K + rows[name] for name in ranks)
        return Group(sum(rows.values()), K, tail, num_adapted)

    @cached_property
    def groups(self) -> tuple[Group, Group, Group, Group]:
        """qkv, o, gate_up and down of a layer."""
        config = self.config
        D, F = config.hidden_size, config.intermediate_size
        q = config.num_attention_heads * config.head_dim
        kv = config.num_key_value_heads * config.head_dim
        if config.is_fused:
            qkv, gate_up = {"qkv_proj": q + 2 * kv}, {"gate_up_proj": 2 * F}
        else:
            qkv, gate_up = {"q_proj": q, "k_proj": kv, "v_proj": kv}, {"gate_proj": F, "up_proj": F}
        return (
            self._group(D, "self_attn", **qkv),
            self._group(q, "self_attn", o_proj=D),
            self._group(D, "mlp", **gate_up),
            self._group(F, "mlp", down_proj=D),
        )

    @property
    def num_adapted(self) -> int:
        """Numbers of the adapter."""
        return sum(group.num_adapted for group in self.groups)
