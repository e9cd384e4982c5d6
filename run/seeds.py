"""Numbers that follow from texts: seeds of micro-batches, and what tells two runs apart."""

import hashlib

# a hash of this size fits into an int64
HASH_BYTES = 7


def dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    """Derive a micro-batch's seed from its place: a resumed run needs no random state."""
    return hash_of(f"{seed} {step} {micro_batch}")


def hash_of(text: str) -> int:
    """Compute a number that is the same for equal texts, on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:HASH_BYTES], "big")
