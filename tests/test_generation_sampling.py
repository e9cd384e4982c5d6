"""generation/sampling.py: against transformers' processors, and the statistics of its draws."""

import json
import math
from pathlib import Path

import pytest
import torch
from support.peer_process import run_peer
from torch import Tensor

from generation.sampling import Sampling, choose, distribution, penalize, uniform

PEER = Path(__file__).with_name("support") / "sampling_peer.py"
VOCABULARY = 500
CASES = {
    "temperature": Sampling(0.7),
    "hot": Sampling(2.5),
    "top-k": Sampling(1.0, top_k=7),
    "top-k of the whole vocabulary": Sampling(1.0, top_k=VOCABULARY + 1),
    "top-p": Sampling(1.0, top_p=0.6),
    "top-p of the first token alone": Sampling(0.5, top_p=1e-3),
    "all of them": Sampling(0.8, top_k=50, top_p=0.9, repetition_penalty=1.3),
    "a penalty below one": Sampling(1.1, top_p=0.95, repetition_penalty=0.7),
}
# how many standard deviations a sum of independent draws may be off: less than once in a billion
SIGMAS = 6


def numbers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def draw(logits: Tensor, sampling: Sampling, num_draws: int) -> Tensor:
    """Draw a token of one row of logits at many places."""
    many = logits.expand(num_draws, -1)
    return choose(many, sampling, None, torch.zeros(num_draws).long(), torch.arange(num_draws))


@pytest.fixture
def logits(seed: int) -> Tensor:
    values = 3 * torch.randn(4, VOCABULARY)
    # as probable as another one, at the border of top-k too
    values[0, 100:120] = values[0].sort(descending=True).values[6]
    return values


def by_ids(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """The normalized probabilities of all tokens, in the order of their ids."""
    logits = penalize(logits, sampling.repetition_penalty, seen)
    probabilities, ids = distribution(logits, sampling)
    assert probabilities.dtype == torch.float64
    total = probabilities.sum(dim=1, keepdim=True)
    return torch.empty_like(probabilities).scatter(1, ids, probabilities / total)


def test_probabilities_equal_transformers(logits: Tensor, tmp_path: Path) -> None:
    sequences = torch.randint(0, VOCABULARY, (4, 60))
    seen = torch.zeros(4, VOCABULARY, dtype=torch.bool).scatter(1, sequences, True)
    cases = json.dumps({name: sampling._asdict() for name, sampling in CASES.items()})
    tensors = {"logits": logits.double(), "seen": sequences}
    expected = run_peer(PEER, tmp_path, tensors, {"cases": cases})
    for name, sampling in CASES.items():
        actual, theirs = by_ids(logits, sampling, seen), expected[name]
        assert actual.isfinite().all()
        assert actual.shape == theirs.shape
        # which of equally probable tokens top-p keeps is nobody's promise
        assert torch.equal(actual[1:] > 0, theirs[1:] > 0), name
        actual, theirs = (each.sort(dim=1).values for each in (actual, theirs))
        assert torch.equal(actual > 0, theirs > 0), name
        # penalty and temperature round each logit twice to float32, and so the difference of two
        largest = float(logits.abs().max()) * 1.43 / sampling.temperature
        tolerance = 4 * torch.finfo(torch.float32).eps * largest
        assert ((actual - theirs).abs() <= tolerance * theirs).all(), name


def test_greedy_is_the_most_probable_penalized_token(logits: Tensor) -> None:
    best = logits.argmax(dim=1)
    zeros = torch.zeros(4).long()
    assert torch.equal(choose(logits, Sampling(), None, zeros, zeros), best)
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, best.unsqueeze(1), True)
    chosen = choose(logits, Sampling(repetition_penalty=1e3), seen, zeros, zeros)
    assert torch.equal(chosen, logits.masked_fill(seen, -torch.inf).argmax(dim=1))


@pytest.mark.parametrize("name", CASES)
def test_draws_have_the_distribution(logits: Tensor, name: str) -> None:
    sampling = CASES[name]._replace(repetition_penalty=1.0)
    num_draws = 20_000
    expected = num_draws * by_ids(logits[:1], sampling)[0]
    counts = draw(logits[:1], sampling, num_draws).bincount(minlength=VOCABULARY)
    assert (counts[expected == 0] == 0).all()
    # Pearson's statistic needs some five draws expected in each class: rare tokens are one class
    is_rare = expected < 5
    classes = torch.cat((expected[~is_rare], expected[is_rare].sum().reshape(1)))
    drawn = torch.cat((counts[~is_rare], counts[is_rare].sum().reshape(1))).double()
    drawn, classes = drawn[classes > 0], classes[classes > 0]
    freedom = len(classes) - 1
    statistic = float(((drawn - classes).square() / classes).sum())
    # chi-square has the mean f and the variance 2 f; the last term is for its long upper tail
    assert statistic <= freedom + SIGMAS * math.sqrt(2 * freedom) + SIGMAS**2


def test_uniform_numbers_are_splitmix64s() -> None:
    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    gamma = 0x9E3779B97F4A7C15
    # the first outputs of SplitMix64 from the state 1234567, as its authors' C program prints them
    assert mix(1234567 + gamma) == 6457827717110365317
    assert mix((1234567 + 2 * gamma) % 2**64) == 3203168211198807973
    cases = [(0, 0, 0), (42, 3, 17), (-1, 2**40, 1), (2**64 - 1, 0, 10**6), (-(2**63), 5, 0)]
    for seed, sequence, position in cases:
        state = mix((seed + (sequence + 1) * gamma) % 2**64)
        expected = (mix((state + (position + 1) * gamma) % 2**64) >> 11) / 2**53
        actual = uniform(seed, numbers(sequence), numbers(position))
        assert actual.tolist() == [expected]


def test_uniform_numbers_are_even_and_independent_of_their_neighbours() -> None:
    side = 400
    grid = [axis.reshape(-1) for axis in torch.meshgrid(*2 * [torch.arange(side)], indexing="ij")]
    drawn = torch.stack([uniform(seed, *grid).view(side, side) for seed in range(3)])
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) < 1
    # a bin's count is binomial
    num_bins, total = 64, drawn.numel()
    counts = (drawn * num_bins).long().flatten().bincount(minlength=num_bins).double()
    share = 1 / num_bins
    bound = SIGMAS * math.sqrt(total * share * (1 - share))
    assert ((counts - total * share).abs() <= bound).all()
    # the mean product of independent numbers of variance 1/12 has the deviation 1 / (12 sqrt(n))
    centred = drawn - 0.5
    for dim in range(3):
        pairs = centred.narrow(dim, 0, drawn.shape[dim] - 1) * centred.narrow(
            dim, 1, drawn.shape[dim] - 1
        )
        assert abs(float(pairs.mean())) <= SIGMAS / (12 * math.sqrt(pairs.numel())), dim


def test_a_draw_depends_on_seed_prompt_and_place_alone(logits: Tensor) -> None:
    sampling = Sampling(1.5, top_k=40, top_p=0.9, seed=7)
    sequence, position = numbers(5, 9, 2, 1), numbers(30, 4, 11, 0)
    together = choose(logits, sampling, None, sequence, position)
    assert torch.equal(choose(logits, sampling, None, sequence, position), together)
    for row in range(4):
        some = slice(row, row + 1)
        alone = choose(logits[some], sampling, None, sequence[some], position[some])
        assert torch.equal(alone, together[some])
    for other in (
        choose(logits, sampling._replace(seed=8), None, sequence, position),
        choose(logits, sampling, None, sequence + 1, position),
        choose(logits, sampling, None, sequence, position + 1),
    ):
        assert not torch.equal(other, together)


def test_the_generator_of_the_device_is_left_alone(logits: Tensor) -> None:
    before = torch.get_rng_state()
    draw(logits[:1], Sampling(1.0), 10)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(1.0, top_p=0.999), Sampling(1.0, 3)])
@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-53])
def test_no_token_without_a_probability_is_chosen(
    sampling: Sampling, u: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "generation.sampling.uniform",
        lambda seed, sequence, position: torch.full((len(sequence),), u, dtype=torch.float64),
    )
    # sums of many addends, of which all behind the first thousand are zero
    logits = torch.full((50, 4000), -torch.inf)
    logits[:, 500:1500] = 5 * torch.randn(50, 1000)
    zeros = torch.zeros(50).long()
    chosen = choose(logits, sampling, None, zeros, zeros)
    probabilities = by_ids(logits, sampling)
    assert (probabilities.gather(1, chosen.unsqueeze(1)) > 0).all()
    if u == 0:
        assert torch.equal(chosen, logits.argmax(dim=1))


def test_a_number_past_the_last_sum_takes_the_last_probable_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # more than any rounding can carry it
    monkeypatch.setattr("generation.sampling.uniform", lambda *counters: torch.ones(1).double())
    logits = torch.tensor([[1.0, 3.0, 2.0, -torch.inf]])
    chosen = choose(logits, Sampling(1.0), None, numbers(0), numbers(0))
    assert chosen.tolist() == [0]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(0.5, 10, 0.9, 1.2)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_choose_a_token_of_the_vocabulary(
    sampling: Sampling, value: float
) -> None:
    zeros, seen = torch.zeros(3).long(), torch.zeros(3, 50, dtype=torch.bool)
    logits = torch.randn(3, 50)
    logits[0], logits[1, 7], logits[2, 49] = value, value, value
    chosen = choose(logits, sampling, seen, zeros, zeros)
    assert ((chosen >= 0) & (chosen < 50)).all()


@pytest.mark.gpu
def test_a_gpu_draws_the_same_numbers_and_a_graph_may_hold_the_choice(logits: Tensor) -> None:
    sampling = Sampling(0.8, top_k=50, top_p=0.9, repetition_penalty=1.3, seed=3)
    seen = torch.rand(4, VOCABULARY) < 0.2
    sequence, position = torch.arange(4), torch.arange(4) * 7
    numbers_here = uniform(3, sequence, position)
    assert torch.equal(uniform(3, sequence.cuda(), position.cuda()).cpu(), numbers_here)
    expected = choose(logits, sampling, seen, sequence, position)
    given = [each.cuda() for each in (logits, seen, sequence, position)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        choose(given[0], sampling, *given[1:])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chosen = choose(given[0], sampling, *given[1:])
    graph.replay()
    assert torch.equal(chosen.cpu(), expected)
    # other places, in the graph's own memory
    given[3] += 1
    graph.replay()
    assert torch.equal(chosen.cpu(), choose(logits, sampling, seen, sequence, position + 1))
