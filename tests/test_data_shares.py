"""data/shares.py: how often an epoch has each sample, exactly."""

from collections import Counter

import pytest

from data.shares import Share, samples_of_epoch


@pytest.mark.parametrize("shuffle", [True, False], ids=["shuffled", "in order"])
@pytest.mark.parametrize(
    ("weight", "num_epochs", "times"),
    [(1.0, 1, 1), (2.0, 1, 2), (0.5, 2, 1), (0.25, 8, 2), (1.5, 2, 3), (0.1, 10, 1)],
)
def test_a_weight_is_how_often_an_epoch_has_a_sample(
    weight: float, num_epochs: int, times: int, shuffle: bool
) -> None:
    share = Share("a", weight, 20)
    shares = [Share("before", 1.0, 3), share]
    counted: Counter[int] = Counter()
    for epoch in range(num_epochs):
        found = samples_of_epoch(shares, epoch, 7, shuffle)
        assert found[:3] == [0, 1, 2]
        assert len(found) == 3 + share.num_in_epoch
        counted.update(found[3:])
        # no sample comes again before all others have come
        assert max(counted.values()) - min(counted[i] for i in range(3, 23)) <= 1
    assert counted == dict.fromkeys(range(3, 23), times)


def test_the_seed_and_the_pass_decide_which_half_comes_first() -> None:
    shares = [Share("a", 0.5, 100)]
    halves = [set(samples_of_epoch(shares, epoch, 7, True)) for epoch in range(4)]
    assert not halves[0] & halves[1]
    assert halves[0] not in (halves[2], halves[3])
    assert halves[0] != set(samples_of_epoch(shares, 0, 8, True))
    assert halves[0] == set(samples_of_epoch(shares, 0, 7, True))
    assert set(samples_of_epoch(shares, 1, 7, False)) == set(range(50, 100))


@pytest.mark.parametrize(
    ("weight", "num_samples", "num_in_epoch"),
    [(0.5, 5, 3), (0.5, 1, 1), (0.001, 10, 1), (1.0, 0, 0), (3.0, 7, 21), (0.1, 30, 3)],
)
def test_an_epoch_has_a_whole_number_of_samples(
    weight: float, num_samples: int, num_in_epoch: int
) -> None:
    share = Share("a", weight, num_samples)
    assert share.num_in_epoch == num_in_epoch
    for epoch in range(9):
        assert len(samples_of_epoch([share], epoch, 7, True)) == num_in_epoch
