"""benchmarks/masked_attention.py: what it counts, and a run over tiny heads."""

import pytest
import torch
from support.stand_in_gpu import install
from torch.nn.attention.flex_attention import create_mask

from benchmarks import masked_attention
from benchmarks.command import Machine
from benchmarks.masked_attention import Case
from benchmarks.tables import masked_attention_table

CPU = torch.device("cpu")
MACHINE = Machine(CPU, copy_gbps=3000, matmul_tflops=800, peer=None)
PACKED = Case("packed", "a.layer", 2, 40, (4, 2, 16), sample_tokens=9)
WINDOW = Case("window", "a.layer", 2, 40, (4, 2, 16), window=8)
CAPPED = Case("capped", "a.layer", 1, 40, (4, 2, 16), cap=5.0)


def test_samples_fill_the_rows_and_pairs_are_those_that_see_each_other() -> None:
    positions = masked_attention.positions_of(PACKED)
    assert positions is not None
    assert positions.shape == (2, 40)
    number = (positions == 0).cumsum(dim=1)
    is_seen = (number[:, :, None] == number[:, None, :]).tril()
    assert masked_attention.num_pairs(PACKED, positions) == int(is_seen.sum())
    assert masked_attention.num_pairs(WINDOW, None) == 2 * (sum(range(1, 9)) + 8 * 32)
    assert masked_attention.num_pairs(CAPPED, None) == 40 * 41 // 2


@pytest.mark.parametrize(
    ("case", "providers"),
    [
        (PACKED, ["limit", "ours", "flex", "varlen", "causal"]),
        (WINDOW, ["limit", "ours", "flex", "causal"]),
        (CAPPED, ["limit", "ours", "flex"]),
    ],
    ids=["packed", "window", "capped"],
)
def test_a_run_measures_every_provider(
    monkeypatch: pytest.MonkeyPatch, case: Case, providers: list[str]
) -> None:
    clock = install(monkeypatch)
    clock.tick_ms = 8.0

    def stand_in(*_: object) -> object:
        return masked_attention.causal

    monkeypatch.setattr(masked_attention, "flex", stand_in)
    monkeypatch.setattr(masked_attention, "varlen", stand_in)
    rows = masked_attention.measure_case(case, torch.float32, MACHINE)
    assert [row["provider"] for row in rows] == providers
    header, lines = masked_attention_table(rows)
    assert len(header) == len(lines[0])
    assert lines[0][header.index("ours")] != "-"


def test_the_mask_of_flex_is_ours() -> None:
    positions = masked_attention.positions_of(PACKED)
    assert positions is not None
    bound = masked_attention.flex(PACKED, positions, CPU)
    assert callable(bound)
    mask = create_mask(bound.keywords["block_mask"].mask_mod, 2, 1, 40, 40, device="cpu")
    number = (positions == 0).cumsum(dim=1)
    assert torch.equal(mask[:, 0], (number[:, :, None] == number[:, None, :]).tril())
