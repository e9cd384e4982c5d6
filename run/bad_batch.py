"""The batch of a step that could not be learned from, for a person to look at."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from run.atomic import write_text


class _Sample(Protocol):
    @property
    def input_ids(self) -> Sequence[int]: ...
    @property
    def labels(self) -> Sequence[int]: ...


class _Tokenizer(Protocol):
    def decode(self, ids: list[int], /) -> str: ...


def bad_batch_name(step: int) -> str:
    return f"bad-step-{step}.json"


def write_bad_batch(
    path: Path,
    step: int,
    figures: Mapping[str, float],
    samples: Mapping[int, _Sample],
    tokenizer: _Tokenizer,
    mode: int,
) -> None:
    """Write a step's samples.

    Args:
        figures: of the step, which need not be finite.
        samples: by their place in the data.
        mode: the file's permissions.
    """
    record = {
        "step": step,
        # JSON has no NaN
        **{name: str(value) for name, value in figures.items()},
        "samples": [
            {
                "index": index,
                "text": tokenizer.decode(list(sample.input_ids)),
                "input_ids": list(sample.input_ids),
                "labels": list(sample.labels),
            }
            for index, sample in samples.items()
        ],
    }
    write_text(path, json.dumps(record) + "\n", mode)
