"""The batch of a step with gradients that are not finite, written down for a person to look at."""

import json
from collections.abc import Mapping
from pathlib import Path

from data.samples import Sample
from data.tokenizer import Tokenizer
from run.atomic import write_text
from run.metrics import Row
from training.run import Run


def leave_batch(run: Run, step: int, figures: Row) -> Path:
    """Write the samples of a step, those of all ranks, into the output folder.

    Args:
        step: counted from 1.
        figures: of the step, which need not be finite.

    Returns:
        The file's place; the first rank alone writes it.
    """
    job = run.job
    path = job.output / f"bad-step-{step}.json"
    if run.ranks.is_first:
        batches = job.epochs.micro_batches(step - 1)
        indices = [index for rows in batches for row in rows for index in row]
        samples = {index: job.epochs.samples[index] for index in indices}
        record = _record(step, figures, samples, job.tokenizer)
        write_text(path, json.dumps(record) + "\n", job.data_mode)
    return path


def _record(
    step: int, figures: Row, samples: Mapping[int, Sample], tokenizer: Tokenizer
) -> dict[str, object]:
    """Describe a step in JSON's terms.

    Args:
        samples: by their place in the data.
    """
    return {
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
