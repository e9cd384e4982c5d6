"""Tokens that a checkpoint has rows for and was never trained on, as base models have for chat.

Such a row is zero, or equal to the row of another untrained token that was initialized with the
same values. A row of random initial values cannot be told from a trained one.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import replace

import torch

from checkpoint.opening import Checkpoint
from checkpoint.shard_reader import StoredTensor, read_tensor


def untrained_rows(
    checkpoint: Checkpoint, ids: Collection[int], others: Collection[int]
) -> set[int]:
    """Find those of some tokens whose row of the embeddings, or of the head, was never trained.

    Without files of weights none is found.

    Args:
        others: more tokens, whose rows are compared with those of `ids`.
    """
    if not checkpoint.shards:
        return set()
    untrained: set[int] = set()
    for table in set(checkpoint.vocabulary().values()):
        rows = {i: _row(table, i) for i in {*ids, *others} if i < table.shape[0]}
        shared = Counter(rows.values())
        untrained |= {i for i in ids if i in rows and (not any(rows[i]) or shared[rows[i]] > 1)}
    return untrained


def _row(table: StoredTensor, index: int) -> bytes:
    num_rows, num_columns = table.shape
    num_bytes = table.num_bytes // num_rows
    start = table.start + index * num_bytes
    row = read_tensor(replace(table, shape=(num_columns,), start=start, num_bytes=num_bytes))
    # -0 has a byte that is not zero; + 0 makes it +0
    return (row + 0).view(-1).view(torch.uint8).numpy().tobytes()
