"""job/checkpoint.py: the largest micro-batch is sized as it will be computed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from micro_steps import LORA
from tiny_llama import write_variant

from data.epochs import Epochs
from data.token_cache import Samples
from data.tokenization import ROW
from job.checkpoint import workload
from llama.config import read_config
from llama.workload import Workload
from run.config import TrainConfig

LENGTHS = [5, 65, 33]


def sized(folder: Path, **fields: object) -> Workload:
    """The workload of a tiny model on a few samples."""
    rows = np.zeros(len(LENGTHS), dtype=ROW)
    rows["length"] = LENGTHS
    ids = np.zeros(sum(LENGTHS), dtype=np.int32)
    config = replace(TrainConfig(model="", data="", output=""), **fields)
    epochs = Epochs(Samples(ids, ids, rows), 1, True, config.batch_size, 1)
    folder = write_variant(folder, "grouped-query")
    return workload(config, LORA, read_config(folder), folder, epochs)


@pytest.mark.parametrize(("device", "num_tokens"), [("cpu", 65), ("cuda", 128)])
def test_rows_are_as_long_as_the_device_computes_them(
    tmp_path: Path, device: str, num_tokens: int
) -> None:
    work = sized(tmp_path, device=device, dtype="bfloat16", batch_size=2)
    assert (work.batch, work.tokens) == (2, num_tokens)


def test_a_batch_has_no_more_rows_than_there_are(tmp_path: Path) -> None:
    assert sized(tmp_path, device="cuda", dtype="bfloat16", batch_size=9).batch == len(LENGTHS)
