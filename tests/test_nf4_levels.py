"""nf4/levels.py: the table is the published one, and the derivation arrives at it."""

import hashlib

import torch
from support.equality import assert_equal

from nf4.levels import LEVELS, MIDPOINTS, OUTERMOST_QUANTILE, derive_levels

# the thresholds that bitsandbytes' kernels are written with
PUBLISHED_MIDPOINTS = [
    *[-0.8480964, -0.6106329, -0.45999527, -0.33967942, -0.2346074, -0.13791174, -0.045525018],
    *[0.03979015, 0.12025525, 0.20352125, 0.29201376, 0.38931254, 0.50166345, 0.6427869],
    0.86147845,
]


def test_table_hashes_to_the_published_one() -> None:
    digest = hashlib.sha256(LEVELS.numpy().astype("<f4").tobytes()).hexdigest()
    assert digest == "8501941daa1b8a90ad1bbfeb632e5101b5dddbc4bb52d6e55abcfd777e60c06a"


def test_derivation_equals_the_table_bit_for_bit() -> None:
    assert_equal(derive_levels(), LEVELS)


def test_midpoints_are_the_published_thresholds() -> None:
    assert_equal(MIDPOINTS, torch.tensor(PUBLISHED_MIDPOINTS))


def test_levels_ascend_from_minus_one_to_one_with_an_exact_zero_at_7() -> None:
    assert (LEVELS.diff() > 0).all()
    assert [LEVELS[i].item() for i in (0, 7, 15)] == [-1.0, 0.0, 1.0]


def test_outermost_quantile_is_the_mean_of_the_two_half_bins() -> None:
    # seven decimals were published
    assert abs(OUTERMOST_QUANTILE - (1 - 1 / 30 + 1 - 1 / 32) / 2) < 0.5e-7
