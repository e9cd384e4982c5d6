"""The next token of every sequence: a pass, a choice, and the state that both leave on the device.

    ids, lengths -> pass -> logits -> choice -> ids, lengths

Nothing of that waits for the host, so on a GPU a step is one captured CUDA graph: some three
hundred launches, which would take Python ten times as long as the GPU.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from generation.prompt_pass import PromptPass
from generation.sampling import Sampling, choose
from generation.token_pass import TokenPass
from kernels.capture import recording
from llama.cache import KeyValueCache
from llama.model import Llama


class TokenStep:
    """Sequences that grow by a token a step, each in a slot of a cache.

    Attributes:
        ids: (B,) int64, the newest token of each sequence, which the cache does not have yet.
    """

    def __init__(
        self,
        model: Llama,
        sampling: Sampling,
        capacity: int,
        num_sequences: int,
        captures: bool,
    ) -> None:
        """Allocate the cache and the state of idle slots.

        Args:
            captures: on a GPU, replay steps and prompts as CUDA graphs.
        """
        self._model, self._sampling, self._captures = model, sampling, captures
        device = model.device
        if device.type != "cpu":
            model.make_tables()
        self._cache = KeyValueCache(
            model.config, num_sequences, capacity, model.compute_dtype, device
        )
        self._prompt_pass = PromptPass(model, self._cache, captures)
        self._pass = TokenPass(model, self._cache)
        # of idle slots the first row of the cache is written again and again
        self.ids, self._lengths, self._is_running, self._is_long, self._numbers = (
            torch.zeros(num_sequences, dtype=torch.int64, device=device) for _ in range(5)
        )
        self._seen = None
        if sampling.repetition_penalty != 1:
            shape = (num_sequences, model.config.vocab_size)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def begin(self, slot: int, prompt: Sequence[int], number: int) -> None:
        """Run a prompt through the model, and choose the first token after it.

        Args:
            number: tells the draws of this sequence from those of others.
        """
        T = len(prompt)
        hidden = self._prompt_pass(prompt, slot)
        self._numbers[slot] = number
        self._lengths[slot] = T
        self._is_long[slot] = int(self._model.config.is_long(T))
        self._is_running[slot] = 1
        seen = None
        if self._seen is not None:
            seen = self._seen[slot : slot + 1]
            seen.zero_()
            seen[0, torch.tensor(prompt, device=seen.device)] = True
        place = slice(slot, slot + 1)
        self.ids[place] = self._choose(hidden, seen, self._numbers[place], self._lengths[place])

    def end(self, slot: int) -> None:
        """Let a slot be idle."""
        self._is_running[slot] = 0
        self._lengths[slot] = 0

    @torch.no_grad()
    def __call__(self) -> None:
        """Append `ids` to the sequences, and choose the tokens after them."""
        if self._graph is not None:
            self._graph.replay()
            return
        # compiles the kernels, where that was not done yet
        self._run()
        if self._captures and self._model.device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with recording(graph):
                self._run()
            self._graph = graph

    def _run(self) -> None:
        hidden = self._pass(self.ids, self._lengths, self._is_long)
        chosen = self._choose(hidden, self._seen, self._numbers, self._lengths + 1)
        self.ids.copy_(torch.where(self._is_running > 0, chosen, self.ids))
        self._lengths += self._is_running

    def _choose(
        self, hidden: Tensor, seen: Tensor | None, numbers: Tensor, positions: Tensor
    ) -> Tensor:  # (B,)
        chosen = choose(self._model.project(hidden), self._sampling, seen, numbers, positions)
        if seen is not None:
            seen.scatter_(1, chosen[:, None], True)
        return chosen
