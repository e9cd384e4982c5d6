"""benchmarks/fp8_error.py: its errors where they are known, and a run of the bundled model."""

import pytest
import torch
from torch import Tensor

from benchmarks import fp8_error
from benchmarks.fp8_error import PROVIDERS, gradient_rows, measure, products, relative_error
from benchmarks.tables import fp8_error_table
from kernels.fp8 import E4M3
from nf4.levels import LEVELS
from nf4.weight import quantize
from prepare.job import BUNDLED_RUN

# micro-batches of a step, two of them
SMALL = ("--batch-size", "2", "--gradient-accumulation-steps", "2")


def drawn(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("is_transposed", [False, True])
def test_drawn_operands_err_as_their_roundings_say(is_transposed: bool) -> None:
    weight = quantize(drawn(256, 512) * 0.02, 64, double_quant=True)
    x = drawn(64, 256 if is_transposed else 512).bfloat16()
    found = products(x, weight, is_transposed)
    errors = {name: relative_error(found[name], found["exact"]) for name in PROVIDERS}
    # a Gaussian rounded to 8 significant bits errs 0.17 %, and in bfloat16 the weight and y are; to
    # 4 bits 2.65 %, and in E4M3 x and the weight are
    assert errors["bf16"] == pytest.approx(0.0017 * 2**0.5, rel=0.1)
    assert errors["fp8"] == pytest.approx(0.0265 * 2**0.5, rel=0.05)
    assert errors["fp8-by-row"] == pytest.approx(0.0265 * 2**0.5, rel=0.05)


def test_a_scale_a_row_saves_a_row_that_is_far_smaller() -> None:
    # with one scale its weights are below E4M3's smallest number
    W = torch.cat([drawn(16, 64), 2.0**-30 * drawn(16, 64)])
    found = products(drawn(8, 64).bfloat16(), quantize(W, 64, double_quant=False), False)
    small = {name: relative_error(found[name][:, 16:], found["exact"][:, 16:]) for name in found}
    assert small["fp8"] == 1
    assert small["fp8-by-row"] < 0.05


def test_the_largest_is_over_its_own_rows_rms() -> None:
    x = torch.zeros(3, 64)
    x[0, 5], x[1] = -7.0, 100.0
    # one value of 64 is 8 times the root mean square; the row of zeros counts as none
    assert fp8_error.largest_over_rms(x) == 8


def test_gradients_are_compared_by_layer_and_as_a_whole() -> None:
    one, other = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 5.0])
    *layers, whole = gradient_rows([one, one], [one, one], [one, other])
    assert [(row["layer"], row["bf16"], row["fp8"]) for row in layers] == [
        (0, 0.0, 0.0),
        (1, 0.0, round(10**0.5 / 5, 6)),
    ]
    assert (whole["layer"], whole["cosine-bf16"], whole["cosine-fp8"]) == (None, 1.0, 0.9)


def test_a_run_measures_every_product_of_every_layer() -> None:
    flags = ["--model", BUNDLED_RUN["model"], "--data", BUNDLED_RUN["data"]]
    rows, measured = measure([*fp8_error.FLAGS, *flags, "--max-length", "64", *SMALL], steps=1)
    assert measured["tokens"] > measured["target_tokens"] > 0
    assert measured["cosine_of_next_batch"] < 0.99
    products_of = {
        product: [row for row in rows if row["product"] == product]
        for product in ("y", "grad_x", "gradient")
    }
    assert {row["projection"] for row in products_of["y"]} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert [len(found) for found in products_of.values()] == [4 * 7, 4 * 4 - 1, 4 + 1]
    for row in [*products_of["y"], *products_of["grad_x"]]:
        assert row["bf16"] < 0.005 < row["fp8"] < 0.08
        assert row["fp8-by-row"] < 0.08
    # an adapter with a gradient of A, in three ways
    for row in products_of["gradient"]:
        assert 0 < row["bf16"] < row["fp8"] < 0.5
    header, lines = fp8_error_table(rows)
    assert [line[0] for line in lines] == [*7 * ["y"], *4 * ["grad_x"], "gradient", "cosine"]
    assert {len(line) for line in lines} == {len(header)}


def test_levels_in_e4m3_are_the_case_of_one_block() -> None:
    # every weight of one block and one scale: a level times 448, rounded
    W = LEVELS.repeat(16, 4)
    found = products(torch.eye(64).bfloat16(), quantize(W, 64, double_quant=False), False)
    expected = (448 * W).to(E4M3).float() / 448
    torch.testing.assert_close(found["fp8"], expected.T.bfloat16(), rtol=0, atol=0)
