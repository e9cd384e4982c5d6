"""kernels/neftune.py: uniform noise of the scale that is asked for, the same everywhere."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.ahead_of_time import compile_launch, on_each_gpu
from support.equality import assert_equal
from support.interpreter import interpreted_results
from support.neftune_cases import SEED, TINY_NOISES, NoiseCase, noise_cases, noise_inputs, noisy

from kernels import neftune as module
from kernels.dropout import keep_reference, philox_reference
from kernels.neftune import SITE, neftune_, neftune_reference, noise_scale

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CUDA = torch.device("cuda")
GPU_CASES = noise_cases([(0, 64), (1, 1), (67, 997), (131, 4096), (33, 14336)], DTYPES)


def expected(case: NoiseCase) -> torch.Tensor:
    return neftune_reference(*noise_inputs(case)).to(case.dtype)


@pytest.mark.parametrize("case", TINY_NOISES, ids=str)
def test_interpreted_kernel_adds_what_the_reference_does(case: NoiseCase) -> None:
    assert_equal(interpreted_results("neftune")[str(case)], expected(case))


@pytest.mark.parametrize("case", noise_cases([(0, 64), (1, 1), (5, 97)], DTYPES), ids=str)
def test_on_a_cpu_the_reference_adds(case: NoiseCase) -> None:
    assert_equal(noisy(case, neftune_), expected(case))


def test_a_value_takes_the_word_of_its_row_and_column() -> None:
    noise = neftune_reference(torch.zeros(3, 7), torch.ones(3), torch.tensor([SEED]))
    low = 0xFFFFFFFF
    key = tuple(torch.tensor([word]) for word in (SEED & low, SEED >> 32 & low))
    for m in range(3):
        for k in range(7):
            counter = tuple(torch.tensor([word]) for word in (k // 4, m, SITE, 0))
            word = int(philox_reference(counter, key)[k % 4])
            assert float(noise[m, k]) == (word >> 8) / 2**23 - 1


def test_the_noise_is_uniform_up_to_its_scale() -> None:
    M, D = 613, 997
    u = neftune_reference(torch.zeros(M, D), torch.ones(M), torch.tensor([SEED])).double()
    assert u.min() >= -1
    assert u.max() < 1
    # six standard deviations of the moments' means: those of u are 1/3, of u^2 4/45
    assert abs(float(u.mean())) < 6 * math.sqrt(1 / 3 / (M * D))
    assert abs(float(u.square().mean()) - 1 / 3) < 6 * math.sqrt(4 / 45 / (M * D))
    # neighbours, along rows and columns, know nothing of each other
    for shifted in (u[:, 1:] * u[:, :-1], u[1:] * u[:-1]):
        assert abs(float(shifted.mean())) < 6 * (1 / 3) / math.sqrt(shifted.numel())


def test_each_seed_has_its_own_and_has_it_again() -> None:
    zeros, ones = torch.zeros(4, 64), torch.ones(4)
    drawn = [neftune_reference(zeros, ones, torch.tensor([seed])) for seed in (0, 1, 2**32, 0)]
    assert torch.equal(drawn[0], drawn[3])
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_noise_goes_its_own_way_under_the_seed_of_a_micro_batchs_dropout() -> None:
    seed = torch.tensor([SEED])
    is_positive = neftune_reference(torch.zeros(1, 64), torch.ones(1), seed) >= 0
    # of one word, noise is positive where dropout by a half keeps: four groups in 126 layers
    for site in range(4 * 126):
        assert not torch.equal(keep_reference((1, 64), seed, site, 0.5), is_positive)


def test_the_scale_is_that_of_the_paper_and_padding_has_none() -> None:
    scale = noise_scale(torch.tensor([[4, 4, 4, 4, 0], [5, 5, 5, 5, 5]]), 5.0, 64)
    assert scale.dtype == torch.float32
    assert scale[0].tolist() == [5 / 16] * 4 + [0.0]
    torch.testing.assert_close(scale[1], torch.full((5,), 5 / math.sqrt(5 * 64)), rtol=1e-6, atol=0)


X, SCALE, ONE_SEED = torch.ones(3, 4), torch.ones(3), torch.zeros(1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": X.int()}, "^x must be bfloat16, float16 or float32"),
        ({"x": X[0]}, "^x must be a matrix"),
        ({"x": torch.ones(4, 3).T}, "^x must be contiguous: got strides"),
        ({"scale": SCALE[:2]}, r"^the scale must be torch.float32 of shape \(3,\)"),
        ({"scale": SCALE.double()}, "^the scale must be torch.float32 .* got torch.float64"),
        ({"seed": ONE_SEED.int()}, "^the seed must be one int64"),
        ({"seed": ONE_SEED.to("meta")}, "must be on one device"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        neftune_(**{"x": X, "scale": SCALE, "seed": ONE_SEED} | changes)


@on_each_gpu(DTYPES)
@pytest.mark.parametrize("width", [4096, 997], ids="D{}".format)
def test_kernel_compiles_without_spilling(
    dtype: torch.dtype,
    width: int,
    capability: int,
    record_property: Callable[[str, object], None],
) -> None:
    x = torch.empty(2, width, dtype=dtype)
    compiled = compile_launch(
        module,
        "_neftune_kernel",
        lambda: module._launch_neftune(x, torch.empty(2), torch.zeros(1, dtype=torch.int64)),
        capability,
    )
    record_property("resources", str(compiled))
    compiled.assert_fits(capability)
    if width == 4096:
        assert compiled.shared_bytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_gpu_kernel_adds_what_the_reference_does(case: NoiseCase) -> None:
    assert_equal(noisy(case, neftune_, CUDA).cpu(), expected(case))


@pytest.mark.gpu
def test_gpu_graph_takes_its_seed_from_the_device() -> None:
    scale, seed = torch.ones(67, device=CUDA), torch.tensor([SEED], device=CUDA)
    x = torch.zeros(67, 997, device=CUDA)
    neftune_(x, scale, seed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        neftune_(x.zero_(), scale, seed)
    for value in (SEED, 1, SEED):
        seed.fill_(value)
        graph.replay()
        on_cpu = neftune_(torch.zeros(67, 997), torch.ones(67), torch.tensor([value]))
        assert_equal(x.cpu(), on_cpu)
