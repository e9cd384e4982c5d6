"""Which tokens a token sees in attention: the record of a row's samples, in torch and in Triton.

    row       | a a a | b b b b | c |         three samples
    positions | 0 1 2 | 0 1 2 3 | 0 |         so many tokens of its own before it a token sees
    remaining | 2 1 0 | 3 2 1 0 | 0 |         so many tokens of its own behind it see a token

Token i sees token j where 0 <= i - j <= reach of i; the reach is a window's length less one, and no
more than the token's position in its sample. Both numbers are read from the device, so one launch,
or one captured graph, serves every way to fill a row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.language import tl, triton


class Samples(NamedTuple):
    """Where each token of a row lies, if the row holds several samples."""

    positions: Tensor  # (B, T) int32: tokens of its sample before it
    remaining: Tensor  # (B, T) int32: tokens of its sample after it


def is_seen_reference(
    rows: slice,  # of the queries
    num_queries: int,
    num_keys: int,  # the queries are the last of these tokens
    window: int | None,
    samples: Samples | None,
    device: torch.device,
) -> Tensor:  # (rows, num_keys), with samples (B, rows, num_keys)
    """Compute which keys some queries see, True where a key is seen."""
    places = torch.arange(num_keys - num_queries, num_keys, device=device)[rows]
    distance = places[:, None] - torch.arange(num_keys, device=device)
    is_seen = (distance >= 0) & (distance < (window or num_keys))
    if samples is None:
        return is_seen
    return is_seen & (distance <= samples.positions[:, rows, None])


@triton.jit
def reach_of(in_sample_ptr, offs, num_tokens, window, PACKED: tl.constexpr):
    # how many tokens before these they see, or after these see them
    reach = tl.zeros(offs.shape, tl.int32) + (window - 1)
    if PACKED:
        reach = tl.minimum(reach, tl.load(in_sample_ptr + offs, mask=offs < num_tokens, other=0))
    return reach
