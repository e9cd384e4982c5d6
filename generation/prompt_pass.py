"""A prompt through the model, its keys and values into the cache, the hidden state of its end out.

On a GPU the launches of a length that comes again are captured into a CUDA graph, as in training:
they take Python longer than the GPU needs for 2,000 tokens. Lengths are rounded up to PADDED_TOKENS
so that they come again; attention is causal, so padding behind a prompt changes nothing in it, and
what it leaves in the cache is written over before it is seen.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.constants import no_new_constants
from llama.cache import KeyValueCache, Slot
from llama.model import Llama

PADDED_TOKENS = 64
# of the lengths that are captured; each holds its launches, some 10 MB
MAX_GRAPHS = 32


class _Captured(NamedTuple):
    """The graph of a length, and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    ids: Tensor  # (1, padded)
    last: Tensor  # (1,), index of the prompt's last token
    sequence: Tensor  # (1,)
    hidden: Tensor  # (1, D)


class PromptPass:
    """The model, for the first tokens of a sequence of a cache."""

    def __init__(self, model: Llama, cache: KeyValueCache, captures: bool) -> None:
        """Prepare for prompts of any length.

        Args:
            captures: on a GPU, replay a length that comes again as a CUDA graph.
        """
        self._model, self._cache = model, cache
        self._captures = captures and model.device.type == "cuda"
        self._seen: set[int] = set()
        self._captured: dict[int, _Captured] = {}
        # of all graphs, which take turns
        self._pool = torch.cuda.graph_pool_handle() if self._captures else None

    @torch.no_grad()
    def __call__(self, prompt: Sequence[int], sequence: int) -> Tensor:  # (1, D)
        """Fill a sequence's rows of the cache, and find the last token's hidden state."""
        device, T = self._model.device, len(prompt)
        captured = self._captured_for(T)
        if captured is None:
            ids = torch.tensor([prompt], device=device)
            last = torch.full((1,), T - 1, device=device)
            return self._run(ids, last, torch.full((1,), sequence, device=device))
        captured.ids.zero_()
        captured.ids[0, :T] = torch.tensor(prompt, device=device)
        captured.last.fill_(T - 1)
        captured.sequence.fill_(sequence)
        captured.graph.replay()
        return captured.hidden

    def _run(self, ids: Tensor, last: Tensor, sequence: Tensor) -> Tensor:
        hidden = self._model.hidden_states(ids, Slot(self._cache, sequence))
        return hidden[0].index_select(0, last)

    def _captured_for(self, num_tokens: int) -> _Captured | None:
        """Find a length's graph, recording it when the length comes for the second time.

        By then its kernels are compiled.
        """
        padded = num_tokens + -num_tokens % PADDED_TOKENS
        # padding must not make a sequence one of the long ones
        is_long = self._model.config.is_long
        if not self._captures or is_long(num_tokens) != is_long(padded):
            return None
        is_known = padded in self._seen
        self._seen.add(padded)
        if is_known and padded not in self._captured and len(self._captured) < MAX_GRAPHS:
            self._captured[padded] = self._capture(padded)
        return self._captured.get(padded)

    def _capture(self, padded: int) -> _Captured:
        """Record the pass; nothing is computed."""
        graph = torch.cuda.CUDAGraph()
        device = self._model.device
        ids = torch.zeros(1, padded, dtype=torch.int64, device=device)
        last, sequence = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
        with no_new_constants(), torch.cuda.graph(graph, pool=self._pool):
            hidden = self._run(ids, last, sequence)
        return _Captured(graph, ids, last, sequence, hidden)
