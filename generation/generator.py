"""Continue prompts, several at a time, until each ends."""

from collections import abc, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import torch
from torch import Tensor

from generation.sampling import Sampling
from generation.token_step import TokenStep
from llama.model import Llama


@dataclass(eq=False)
class _Text:
    """A prompt and its answer so far, in a slot."""

    number: int
    slot: int
    prompt: Sequence[int]
    # tokens that the device was asked for; the last may not have been looked at yet
    num_asked: int = 0
    new_ids: list[int] = field(default_factory=list)


@dataclass
class _Read:
    """Tokens on their way from the device, and the texts that they belong to."""

    texts: list[_Text]
    ids: Tensor  # (B,), on the CPU
    arrived: torch.cuda.Event | None

    def tokens(self) -> list[tuple[_Text, int]]:
        """Wait for the tokens."""
        if self.arrived is not None:
            self.arrived.synchronize()
        ids = self.ids.tolist()
        return [(text, ids[text.slot]) for text in self.texts]


class Generator:
    """Continues prompts with one model and one way to choose tokens.

    The device is one step ahead of the host: while the host looks at a token, the next one is being
    computed. A text that has ended leaves its slot to the next prompt at once.

    The model's adapter must stay as it is: a generator has rounded copies of it. After a change of
    the adapter make a new generator.

    Attributes:
        capacity: tokens that a prompt and its answer may have together.
    """

    def __init__(
        self,
        model: Llama,
        sampling: Sampling,
        capacity: int,
        num_sequences: int = 1,
        captures: bool = True,
    ) -> None:
        """Allocate the cache, and round the adapter.

        Args:
            num_sequences: that are continued at a time.
            captures: on a GPU, replay a token's launches as a CUDA graph.
        """
        self.capacity = capacity
        self._model = model
        self._free = list(range(num_sequences))
        self._is_busy = False
        self._step = TokenStep(model, sampling, capacity, num_sequences, captures)

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, stop_ids: Collection[int]
    ) -> abc.Generator[int, None, None]:
        """Continue a prompt, token by token, until one of `stop_ids`, which is not yielded.

        Closing the iterator ends the text.

        Raises:
            ValueError: the prompt is empty, it and `max_new_tokens` exceed the capacity, or an
                iterator of an earlier call is neither at its end nor closed.
        """
        with closing(self._continue([prompt], max_new_tokens, stop_ids)) as texts:
            for _, token in texts:
                if token is not None:
                    yield token

    def complete(
        self, prompts: Iterable[Sequence[int]], max_new_tokens: int, stop_ids: Collection[int]
    ) -> Iterator[tuple[int, list[int]]]:
        """Continue many prompts.

        Yields:
            Each prompt's number and its new tokens, as soon as it has ended. An answer does not
            depend on the prompts beside it, but for roundings.

        Raises:
            ValueError: as `stream`.
        """
        with closing(self._continue(prompts, max_new_tokens, stop_ids)) as texts:
            for text, token in texts:
                if token is None:
                    yield text.number, text.new_ids

    @torch.no_grad()
    def _continue(
        self, prompts: Iterable[Sequence[int]], max_new_tokens: int, stop_ids: Collection[int]
    ) -> abc.Generator[tuple[_Text, int | None], None, None]:
        """Continue prompts, and yield each new token, and None where a text ends."""
        # a step moves all slots on: the texts of two calls would miss tokens
        if self._is_busy:
            raise ValueError(
                "a generator must continue the prompts of one call at a time: the iterator of an "
                "earlier call is half-read; read it to its end or close it"
            )
        self._is_busy = True
        waiting = enumerate(prompts)
        running: list[_Text] = []
        reads: deque[_Read] = deque()
        has_more = True

        def look(num_left: int) -> Iterator[tuple[_Text, int | None]]:
            """Take in all reads but the newest ones."""
            while len(reads) > num_left:
                for text, token in reads.popleft().tokens():
                    if text not in running:
                        continue
                    if token not in stop_ids:
                        text.new_ids.append(token)
                        yield text, token
                    if token in stop_ids or len(text.new_ids) == max_new_tokens:
                        running.remove(text)
                        self._leave(text)
                        yield text, None

        try:
            while has_more or running:
                while has_more and self._free:
                    number, prompt = next(waiting, (0, None))
                    has_more = prompt is not None
                    if prompt is None:
                        break
                    self._check(prompt, max_new_tokens)
                    text = _Text(number, self._free[-1], list(prompt))
                    if max_new_tokens == 0:
                        yield text, None
                        continue
                    self._free.pop()
                    running.append(text)
                    self._begin(text, reads)
                if any(self._outgrows(text) for text in running):
                    yield from look(0)
                    for text in filter(self._outgrows, running):
                        self._begin(text, reads)
                growing = [text for text in running if text.num_asked < max_new_tokens]
                if growing:
                    self._step()
                    for text in growing:
                        text.num_asked += 1
                    reads.append(self._read(growing))
                # the newest tokens are looked at when the step after them is under way
                yield from look(int(bool(growing)))
        finally:
            for text in running:
                self._leave(text)
            self._is_busy = False

    def _begin(self, text: _Text, reads: deque[_Read]) -> None:
        """Run all of a text that is known through the model."""
        self._step.begin(text.slot, [*text.prompt, *text.new_ids], text.number)
        text.num_asked += 1
        reads.append(self._read([text]))

    def _outgrows(self, text: _Text) -> bool:
        """Tell whether a text becomes so long that its keys need other rotary frequencies."""
        num_cached = len(text.prompt) + text.num_asked - 1
        return self._model.starts_anew(num_cached, num_cached + 1)

    def _check(self, prompt: Sequence[int], max_new_tokens: int) -> None:
        if not prompt:
            raise ValueError("a prompt must hold at least one token: got none")
        if len(prompt) + max_new_tokens > self.capacity:
            raise ValueError(
                f"a prompt and its answer must have at most {self.capacity} tokens: "
                f"got {len(prompt)} and {max_new_tokens}"
            )

    def _read(self, texts: list[_Text]) -> _Read:
        """Send the newest tokens to the host."""
        ids = self._step.ids
        if ids.device.type == "cpu":
            return _Read(texts, ids.clone(), None)
        host = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True)
        host.copy_(ids, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return _Read(texts, host, arrived)

    def _leave(self, text: _Text) -> None:
        self._step.end(text.slot)
        self._free.append(text.slot)


def generate_greedy(
    model: Llama, prompt: Sequence[int], max_new_tokens: int, stop_ids: Collection[int]
) -> list[int]:
    """Continue one prompt by the most probable token until one of `stop_ids`.

    Raises:
        ValueError: the prompt is empty.
    """
    generator = Generator(model, Sampling(), len(prompt) + max_new_tokens)
    new_ids = list(generator.stream(prompt, max_new_tokens, stop_ids))
    if model.device.type == "cuda":
        # no later graph could use the memory of this one
        del generator
        torch.cuda.empty_cache()
    return new_ids
