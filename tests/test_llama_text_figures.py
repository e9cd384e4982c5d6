"""llama/text_figures.py: perplexity and logits are the model's own, capped where it caps them."""

import math
from pathlib import Path

import pytest
from support.micro_steps import load_tiny, tokens

from llama.text_figures import logit_change, read_text, windows_of
from rows.batch import Batch


@pytest.mark.parametrize("variant", ["grouped-query", "gemma2"])
def test_figures_are_those_of_the_models_loss_and_logits(tmp_path: Path, variant: str) -> None:
    base = load_tiny(tmp_path / "base", lora=None, variant=variant)
    trained = load_tiny(tmp_path / "trained", variant=variant)
    windows = windows_of(tokens(50).tolist(), 20)
    assert [ids.shape[1] for ids in windows] == [20, 20, 10]
    readings = {model: read_text(model, windows) for model in (base, trained)}
    for model, reading in readings.items():
        loss = sum(float(model.loss(Batch(ids, ids))) for ids in windows) / (50 - 3)
        assert reading.perplexity == pytest.approx(math.exp(loss), rel=1e-6)
    change = logit_change(base, readings[base], readings[trained])
    apart = [(base.logits(ids) - trained.logits(ids)).abs() for ids in windows]
    assert change.largest == pytest.approx(max(float(x.max()) for x in apart), rel=1e-5)
    total = sum(float(x.double().sum()) for x in apart)
    assert change.mean == pytest.approx(total / sum(x.numel() for x in apart), rel=1e-5)
    assert change.largest > 0
