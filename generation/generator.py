"""Continue prompts, several at a time, until each ends."""

from collections.abc import Collection, Iterable, Iterator, Sequence

from generation.sampling import Sampling
from llama.generation import generate_greedy
from llama.model import Llama


class Generator:
    """Continues prompts with one model and one way to choose tokens.

    Attributes:
        capacity: tokens that a prompt and its answer may have together.
    """

    def __init__(
        self, model: Llama, sampling: Sampling, capacity: int, num_sequences: int = 1
    ) -> None:
        """Allocate the cache.

        Args:
            num_sequences: that are continued at a time.
        """
        self.model, self.sampling = model, sampling
        self.capacity, self.num_sequences = capacity, num_sequences

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, stop_ids: Collection[int]
    ) -> Iterator[int]:
        """Continue a prompt, token by token, until one of `stop_ids`, which is not yielded.

        Raises:
            ValueError: the prompt is empty, or it and `max_new_tokens` exceed the capacity.
        """
        yield from generate_greedy(self.model, list(prompt), max_new_tokens, stop_ids)

    def complete(
        self, prompts: Iterable[Sequence[int]], max_new_tokens: int, stop_ids: Collection[int]
    ) -> Iterator[tuple[int, list[int]]]:
        """Continue many prompts.

        Yields:
            Each prompt's number and its new tokens, as soon as it has ended. An answer does not
            depend on the prompts beside it.

        Raises:
            ValueError: as `stream`.
        """
        for number, prompt in enumerate(prompts):
            yield number, list(self.stream(prompt, max_new_tokens, stop_ids))
