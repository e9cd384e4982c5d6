"""llama/text_figures.py: perplexity and logits are the model's own, capped where it caps them."""

import math
from pathlib import Path

import pytest
from support.micro_steps import load_tiny, tokens

from llama.text_figures import logit_change, read_text, windows_of
from rows.batch import NO_LOSS, Batch


@pytest.mark.parametrize("variant", ["grouped-query", "gemma2", "granite"])
def test_figures_are_those_of_the_models_loss_and_logits(tmp_path: Path, variant: str) -> None:
    base = load_tiny(tmp_path / "base", lora=None, variant=variant)
    trained = load_tiny(tmp_path / "trained", variant=variant)
    windows = windows_of(tokens(50).tolist(), 20)
    assert [window.input_ids.shape[1] for window in windows] == [20, 20, 10]
    readings = {model: read_text(model, windows) for model in (base, trained)}
    for model, reading in readings.items():
        loss = sum(float(model.loss(window)) for window in windows) / (50 - 3)
        assert reading.perplexity == pytest.approx(math.exp(loss), rel=1e-6)
    change = logit_change(base, readings[base], readings[trained])
    apart = [(base.logits(w.input_ids) - trained.logits(w.input_ids)).abs() for w in windows]
    assert change.largest == pytest.approx(max(float(x.max()) for x in apart), rel=1e-5)
    total = sum(float(x.double().sum()) for x in apart)
    assert change.mean == pytest.approx(total / sum(x.numel() for x in apart), rel=1e-5)
    assert change.largest > 0


def test_only_tokens_with_a_label_count(tmp_path: Path) -> None:
    model = load_tiny(tmp_path / "base", lora=None)
    ids = tokens(20)[None]
    labels = ids.clone()
    labels[:, :7] = NO_LOSS
    labels[:, 12] = NO_LOSS
    read = read_text(model, [Batch(ids, labels)])
    losses = model.logits(ids)[0, :-1].double().log_softmax(-1)
    counted = [i for i in range(6, 19) if i != 11]
    loss = -sum(float(losses[i, ids[0, i + 1]]) for i in counted) / len(counted)
    assert read.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
