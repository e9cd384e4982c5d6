"""A prompt through the model, its keys and values into the cache, the hidden state of its end out.

On a GPU the launches of a length that comes again are captured into a CUDA graph, as in training:
they take Python longer than the GPU needs for 2,000 tokens. Lengths are rounded up to PADDED_TOKENS
so that they come again; attention is causal, so padding behind a prompt changes nothing in it, and
the padding's keys and values are written over before they are seen. A length is padded from its
first time on, so that a prompt has the same roundings whether it is launched or replayed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.capture import recording
from llama.cache import KeyValueCache, Slot
from llama.model import Llama

PADDED_TOKENS = 64
# of the lengths that are captured; each holds its launches, some 10 MB
MAX_GRAPHS = 32


class _Inputs(NamedTuple):
    """A prompt on the device, and its place."""

    ids: Tensor  # (1, padded)
    last: Tensor  # (1,), index of the prompt's last token
    sequence: Tensor  # (1,)


class _Captured(NamedTuple):
    """The graph of a length, and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: _Inputs
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
        T = len(prompt)
        padded = self._padded(T)
        captured = self._captured_for(padded)
        inputs = self._inputs(padded) if captured is None else captured.inputs
        inputs.ids.zero_()
        inputs.ids[0, :T] = torch.tensor(prompt, device=inputs.ids.device)
        inputs.last.fill_(T - 1)
        inputs.sequence.fill_(sequence)
        if captured is None:
            return self._run(inputs)
        captured.graph.replay()
        return captured.hidden

    def _inputs(self, padded: int) -> _Inputs:
        shapes = ((1, padded), (1,), (1,))
        return _Inputs(
            *(torch.zeros(s, dtype=torch.int64, device=self._model.device) for s in shapes)
        )

    def _run(self, inputs: _Inputs) -> Tensor:
        hidden = self._model.hidden_states(inputs.ids, Slot(self._cache, inputs.sequence))
        return hidden[0].index_select(0, inputs.last)

    def _padded(self, num_tokens: int) -> int:
        """Round a length up where lengths are captured."""
        padded = num_tokens + -num_tokens % PADDED_TOKENS
        # padding must not make a sequence one of the long ones
        is_long = self._model.config.is_long
        is_alike = is_long(num_tokens) == is_long(padded)
        return padded if self._captures and is_alike else num_tokens

    def _captured_for(self, padded: int) -> _Captured | None:
        """Find a length's graph, recording it when the length comes for the second time.

        By then its kernels are compiled.
        """
        is_known = padded in self._seen
        self._seen.add(padded)
        has_room = self._captures and len(self._captured) < MAX_GRAPHS
        if is_known and has_room and padded not in self._captured:
            self._captured[padded] = self._capture(padded)
        return self._captured.get(padded)

    def _capture(self, padded: int) -> _Captured:
        """Record the pass; nothing is computed."""
        graph, inputs = torch.cuda.CUDAGraph(), self._inputs(padded)
        with recording(graph, self._pool):
            hidden = self._run(inputs)
        return _Captured(graph, inputs, hidden)
