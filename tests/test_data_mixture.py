"""data/mixture.py: several data sets as one, counted."""

from pathlib import Path

import pytest
from test_data_dataset import load
from test_data_tokenizer import save_byte_level

from data import audit, mixture
from data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(save_byte_level(tmp_path_factory.mktemp("tokenizer")))


def test_several_sets_are_one_with_all_samples(
    tmp_path: Path,
    tokenizer: Tokenizer,
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jsonl").touch(0o600)
    one = load(tmp_path, tokenizer, *({"text": f"number {i}"} for i in range(40)))
    two = load(
        tmp_path / "a", tokenizer, *({"prompt": f"{i} ", "completion": "a"} for i in range(9))
    )
    mixed = mixture.mix([one, two], ["one", "two"], [1.0, 0.5])
    assert list(mixed.samples) == [*one.samples, *two.samples]
    assert mixed.samples[40] == two.samples[0]
    assert mixed.format == "text, prompt-completion"
    assert mixed.counts.num_records == 49
    assert one.counts.num_records == 40
    # text of both is as private as the more private of them
    assert mixed.mode == two.mode == 0o600 != one.mode
    other = [mixture.mix(pair, ["", ""], [1.0, 1.0]) for pair in ([one, two], [two, one])]
    assert mixed.sha256 == other[0].sha256 != other[1].sha256
    # one alone is as it was
    assert mixture.mix([one], ["one"], [1.0]) is one
    weighed = mixture.mix([one], ["one"], [2.0])
    assert [share.num_in_epoch for share in weighed.shares] == [80]
    figures = audit.facts_of(mixed, tokenizer)["sets"]
    assert figures["two"] == {
        "weight": 0.5,
        "samples": 9,
        "tokens": two.num_tokens,
        "target_tokens": two.num_target_tokens,
        "samples_in_epoch": 5,
        "tokens_in_epoch": round(two.num_tokens * 5 / 9),
    }
    assert "sets" not in audit.facts_of(one, tokenizer)
    total = one.num_tokens + figures["two"]["tokens_in_epoch"]
    assert list(mixture.describe(mixed)) == [
        f"one: weight 1, 40 samples an epoch of its 40, {one.num_tokens:,} tokens, "
        f"{one.num_tokens / total:.1%} of all",
        f"two: weight 0.5, 5 samples an epoch of its 9, {figures['two']['tokens_in_epoch']:,} "
        f"tokens, {1 - one.num_tokens / total:.1%} of all",
    ]


def test_samples_for_evaluation_are_set_aside_over_all_sets(
    tmp_path: Path,
    tokenizer: Tokenizer,
) -> None:
    (tmp_path / "a").mkdir()
    records = [{"text": f"number {i}"} for i in range(60)]
    one, two = (
        load(tmp_path, tokenizer, *records[:40]),
        load(tmp_path / "a", tokenizer, *records[30:]),
    )
    mixed = mixture.mix([one, two], ["one", "two"], [1.0, 2.0])
    assert list(mixture.describe(mixed))[2:] == [
        "10 of the samples of two are those of one, too: an epoch has them from both"
    ]
    train, evaluation = mixed.split(0.3)
    assert not audit.num_shared(train, evaluation)
    # an evaluation has every sample once, whatever the weights
    assert not evaluation.shares
    sizes = [len(each.split(0.3)[0].samples) for each in (one, two)]
    assert [share.num_samples for share in train.shares] == sizes
    assert list(train.samples) == [s for each in (one, two) for s in each.split(0.3)[0].samples]
