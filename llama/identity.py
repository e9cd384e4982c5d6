"""The identity of a checkpoint: SHA-256 over its function and a sample of every weight.

    what config.json asks for | name, dtype, shape, sample | name, dtype, shape, sample | ...
                                of the tensors that the model is made of, sorted by name

The place of a tensor does not count: the same weights in other shards are the same checkpoint.
config.json counts as `read_config` reads it: the same function in another program's words is the
same checkpoint, too. The ids of the tokens that end an answer are left out, because repositories
correct them later; so are the places of the norms, which the tensors' names show. Fields at None,
False or 0 are left out, so that a field that another family brings later changes no identity.

The sample is all that is looked at:

    a tensor of 256 KiB or less    all of it
    embeddings and head            64 bytes of each row, because a row may be retrained alone
    any other tensor               64 pages or one for each MiB, at equal distances

Training and merging change numbers all over a matrix, and a sample has at least 131,072 of its
16-bit numbers: a change of one number in ten thousand is seen. A change of a few rows of a
projection may be missed (about one row in a hundred is looked at), and so may a change of single
numbers. A hash of every byte would see them, and takes as long as the disk and SHA-256 need for
the whole checkpoint. The identity tells apart what was mixed up; it is no defence against somebody
who hides a change.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llama.checkpoint import Description
from llama.config import LlamaConfig
from llama.shard_reader import NUM_THREADS, StoredTensor

# of a copy's files: the identity of the checkpoint that it was quantized from
MADE_FROM = "made_from"
# what a disk reads at once; fewer bytes would take as long
PAGE_BYTES = 4096
NUM_PAGES = 64
BYTES_FOR_A_PAGE = 1 << 20
ROW_BYTES = 64


@dataclass(frozen=True)
class Identity:
    """What a checkpoint is.

    Attributes:
        own: of its files.
        original: of the checkpoint in 16 or 32 bits that an adapter can be merged into: its own, or
            that of the one that it was quantized from; empty where its files do not say which.
    """

    own: str
    original: str


def identify(found: Description) -> Identity:
    """Compute a checkpoint's identity from its headers and a sample of its bytes.

    An 8B model in 16 bits takes 0.3 s from the page cache on two free cores. From a disk the memory
    map reads more than the sample, some 4 of the 16 GB, which loading the model then finds there.
    """
    stored = [found.stored[name] for name in sorted(found.slots.keys() | found.nf4.read)]
    vocab_size = found.model.config.vocab_size
    with ExitStack() as stack:
        files = {
            path: stack.enter_context(safe_open(path, framework="pt"))
            for path in dict.fromkeys(tensor.file for tensor in stored)
        }

        def digest_of(tensor: StoredTensor) -> bytes:
            # a view of the memory map: what the sample leaves out is not read
            return _digest(tensor, files[tensor.file].get_tensor(tensor.name), vocab_size)

        # a cold disk answers several threads in the time of one
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            digests = list(pool.map(digest_of, stored))
        origins = {(file.metadata() or {}).get(MADE_FROM, "") for file in files.values()}
    function = json.dumps(_function(found.model.config), sort_keys=True).encode()
    own = hashlib.sha256(function + b"".join(digests)).hexdigest()
    if not found.nf4.states:
        return Identity(own, own)
    return Identity(own, origins.pop() if len(origins) == 1 else "")


def _function(config: LlamaConfig) -> dict[str, Any]:
    left_out = ("eos_token_ids", "norms")
    return {name: v for name, v in asdict(config).items() if v and name not in left_out}


def _digest(stored: StoredTensor, tensor: Tensor, vocab_size: int) -> bytes:
    digest = hashlib.sha256(json.dumps([stored.name, str(stored.dtype), stored.shape]).encode())
    has_token_rows = stored.shape[:1] == (vocab_size,)
    sample = sample_of(tensor.view(-1).view(torch.uint8), vocab_size if has_token_rows else 0)
    digest.update(sample.contiguous().numpy().data)
    return digest.digest()


def sample_of(
    data: Tensor,  # (num_bytes,) uint8
    num_rows: int,  # of a tensor whose rows are tokens; 0: of another
) -> Tensor:
    """View those bytes of a tensor that its identity is made of."""
    num_bytes = len(data)
    if num_bytes <= NUM_PAGES * PAGE_BYTES:
        return data
    if num_rows:
        return data.view(num_rows, -1)[:, :ROW_BYTES]
    num_pages = max(NUM_PAGES, num_bytes // BYTES_FOR_A_PAGE)
    return data.unfold(0, PAGE_BYTES, (num_bytes - PAGE_BYTES) // (num_pages - 1))
