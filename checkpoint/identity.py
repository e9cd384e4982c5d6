"""The identity of a checkpoint: SHA-256 over its function and a sample of every weight.

    what config.json asks for | name, dtype, shape, sample | name, dtype, shape, sample | ...
                                of the tensors that the model is made of, sorted by name

The place of a tensor does not count: the same weights in other shards are the same checkpoint.
config.json counts as `read_config` reads it: the same function in another program's words is the
same checkpoint, too. The ids of the tokens that end an answer are left out, because repositories
correct them later; so are the places of the norms and whether gate and up are one tensor, which the
tensors' names show. Fields at None,
False or 0 are left out, so that a field that another family brings later changes no identity.

Of each tensor only a sample is read:

    a tensor of 256 KiB or less    all of it
    embeddings and head            64 bytes of each row, because a row may be retrained alone
    any other tensor               64 pages or one for each MiB, at equal distances

Training and merging change numbers all over a matrix, and a sample has at least 131,072 of its
16-bit numbers: a change of one number in ten thousand is seen. A change of a few rows of a
projection may be missed (about one row in a hundred is looked at), and so may a change of single
numbers. A hash of every byte would see them, and takes as long as the disk and SHA-256 need for
the whole checkpoint. The identity finds checkpoints that were mixed up; it is no defence against
somebody who hides a change.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from checkpoint.opening import Checkpoint
from checkpoint.shard_reader import NUM_THREADS, StoredTensor, read_bytes
from llama.config import LlamaConfig

# in the metadata of a quantized copy's files: the identity of its source
MADE_FROM = "made_from"
# what a disk reads at once; fewer bytes would take as long
PAGE_BYTES = 4096
NUM_PAGES = 64
BYTES_FOR_A_PAGE = 1 << 20
ROW_BYTES = 64
BYTES_AT_ONCE = 256 << 10


@dataclass(frozen=True)
class Identity:
    """The identity of a checkpoint and that of its original.

    Attributes:
        own: the identity of the checkpoint's files.
        original: the identity of the checkpoint in 16 or 32 bits that an adapter can be merged
            into: this one, or the one that it was quantized from; empty where the files do not say
            which.
    """

    own: str
    original: str


def identify(checkpoint: Checkpoint) -> Identity:
    """Compute a checkpoint's identity from its headers and a sample of its bytes.

    An 8B model in 16 bits takes about half a second from the page cache on two free cores. From a
    disk its embeddings and its head are read whole, 2 of 16 GB, which loading then finds in memory.

    Raises:
        ValueError: a file ends before a tensor's last byte.
    """
    counted = checkpoint.stored.keys() - checkpoint.left_alone
    stored = [checkpoint.stored[name] for name in sorted(counted)]
    vocab_size = checkpoint.config.vocab_size
    # a cold disk answers several threads in the time of one
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        digests = list(pool.map(partial(_digest, vocab_size=vocab_size), stored))
    function = json.dumps(_function(checkpoint.config), sort_keys=True).encode()
    own = hashlib.sha256(function + b"".join(digests)).hexdigest()
    if not checkpoint.nf4.states:
        return Identity(own, own)
    files = {tensor.file for tensor in stored}
    origins = {s.metadata.get(MADE_FROM, "") for s in checkpoint.shards if s.path in files}
    return Identity(own, origins.pop() if len(origins) == 1 else "")


def _function(config: LlamaConfig) -> dict[str, Any]:
    fields = asdict(config)
    for name in ("eos_token_ids", "norms", "is_mlp_fused"):
        del fields[name]
    if config.rotary_dim == config.head_dim:
        del fields["rotary_dim"]
    (rope, *others) = config.distinct_ropes
    if rope is not None and not others:
        # as config.json names what all layers share
        del fields["ropes"]
        fields |= {f"rope_{name}": value for name, value in asdict(rope).items()}
    if config.experts is not None:
        # tensors' names, and what training alone adds
        del fields["experts"]["block"], fields["experts"]["asks_for_aux_loss"]
        if not config.experts.is_by_columns:
            del fields["experts"]["is_by_columns"]
    return {name: value for name, value in fields.items() if value}


def _digest(stored: StoredTensor, vocab_size: int) -> bytes:
    digest = hashlib.sha256(json.dumps([stored.name, str(stored.dtype), stored.shape]).encode())
    has_token_rows = stored.shape[:1] == (vocab_size,)
    starts, num_bytes = sample_of(stored.num_bytes, vocab_size if has_token_rows else 0)
    # stretches close together come in one call, with what is between them
    at_once = max(1, BYTES_AT_ONCE // starts.step)
    with stored.file.open("rb", buffering=0) as file:
        for i in range(0, len(starts), at_once):
            some = starts[i : i + at_once]
            data = torch.empty(some[-1] - some[0] + num_bytes, dtype=torch.uint8)
            read_bytes(stored, some[0], file.fileno(), data)
            stretches = data.as_strided((len(some), num_bytes), (some.step, 1))
            digest.update(stretches.contiguous().numpy().data)
    return digest.digest()


def sample_of(
    num_bytes: int,  # of a tensor
    num_rows: int,  # where its rows are tokens; 0: they are not
) -> tuple[range, int]:
    """Choose the bytes of a tensor that its identity is made of.

    Returns:
        Where each stretch of them begins, and the length of a stretch.
    """
    if num_bytes <= NUM_PAGES * PAGE_BYTES:
        return range(1), num_bytes
    if num_rows:
        row_bytes = num_bytes // num_rows
        return range(0, num_bytes, row_bytes), min(ROW_BYTES, row_bytes)
    num_pages = max(NUM_PAGES, num_bytes // BYTES_FOR_A_PAGE)
    last = num_bytes - PAGE_BYTES
    return range(0, last + 1, last // (num_pages - 1)), PAGE_BYTES
