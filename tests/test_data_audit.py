"""data/audit.py: what is counted, shown and refused before anything is learned."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.chat_cases import say
from test_data_dataset import load
from test_data_tokenizer import save_byte_level, save_metaspace

from data import audit
from data.samples import NO_LOSS, Sample
from data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(
        save_byte_level(tmp_path_factory.mktemp("tokenizer")), chat_template="chatml"
    )


PAIRS = [{"prompt": "#", "completion": "!" * n} for n in (1, 2, 3, 4)]


def test_the_audit_counts_what_became_of_the_records(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [*PAIRS, {"prompt": "#######", "completion": "!"}, {"prompt": "", "completion": ""}]
    dataset = load(tmp_path, tokenizer, *records, {"prompt": 5}, max_length=5, skip_bad_lines=True)
    facts = audit.facts_of(dataset, tokenizer)
    assert facts["dropped"] == {"no target": 1, "cut before the first target": 1, "bad": 1}
    assert (facts["records"], facts["samples"], facts["truncated"], facts["closed"]) == (7, 4, 2, 2)
    assert (facts["tokens"], facts["target_tokens"]) == (4 + 5 + 5 + 5, 2 + 3 + 3 + 3)
    assert (facts["shortest"], facts["median"], facts["longest"]) == (4, 5, 5)
    assert facts["lengths"] == {"4": 1, "8": 3}
    assert (facts["format"], facts["templates"]) == ("prompt-completion", [])
    assert facts["sample"] == "<|begin|>#[[!<|end_of_text|>]]"
    assert facts["bad"] == dataset.counts.bad
    assert json.loads(audit.to_json({"train": facts})) == {"train": facts}
    said = audit.describe(dataset)
    assert said.splitlines() == [
        "prompt-completion (detected)",
        "4 samples, 19 tokens, 11 of them learned (58%)",
        "2 samples end in EOS or a token that closes a turn",
        "2 samples cut to 5 tokens (--max-length)",
        "1 record dropped: what is to be learned is beyond 5 tokens (--max-length)",
        "1 record dropped: nothing to learn in it",
        "1 bad record skipped (--skip-bad-lines):",
        f"  {dataset.counts.bad[0]}",
        "lengths 4 to 5, half of them up to 5",
        "        <= 4 ##########                     1",
        "        <= 8 ############################## 3",
    ]


def test_the_audit_names_the_template_and_the_cache(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [{"messages": say("a", "audited")}] * 2
    for expected in ("", ", tokenized before"):
        dataset = load(tmp_path, tokenizer, *records, data_format="messages")
        assert audit.describe(dataset).splitlines()[:2] == [
            f"messages (as given){expected}",
            f"written by {tokenizer.chat_template().name}",
        ]
    assert "chatml" in tokenizer.chat_template().name


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([1], {"1": 1}),
        ([2, 2, 3, 4, 9], {"2": 2, "4": 2, "8": 0, "16": 1}),
        ([2048, 2049], {"2048": 1, "4096": 1}),
        ([2**29, 2**29 + 1], {str(2**29): 1, str(2**30): 1}),
    ],
)
def test_lengths_are_counted_up_to_powers_of_two(
    lengths: list[int], expected: dict[str, int]
) -> None:
    assert audit.length_histogram(np.array(lengths, np.int32)) == expected


def test_more_than_half_cut_is_refused_but_on_demand(tmp_path: Path, tokenizer: Tokenizer) -> None:
    half = load(tmp_path, tokenizer, *PAIRS, max_length=5)
    audit.check(half, "--data", allow_truncation=False)
    most = load(tmp_path, tokenizer, *PAIRS, max_length=4)
    match = r"--data must fit --max-length.*: 3 of 4 records \(75%\) are cut to 4 tokens; .*--allow"
    with pytest.raises(ValueError, match=match):
        audit.check(most, "--data", allow_truncation=False)
    audit.check(most, "--data", allow_truncation=True)
    # records that lost all their targets count as cut
    gone = [{"prompt": "#" * 9, "completion": "!"}] * 2
    with pytest.raises(ValueError, match="2 of 3 records"):
        audit.check(
            load(tmp_path, tokenizer, PAIRS[0], *gone, max_length=4),
            "--data",
            allow_truncation=False,
        )


def test_no_answer_that_ends_is_refused_where_the_format_promises_one(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    dataset = load(tmp_path, tokenizer, *PAIRS)
    audit.check(dataset, "--data", allow_truncation=False)
    dataset.samples.rows["is_closed"] = False
    with pytest.raises(ValueError, match=r"--eval-data must have samples whose last target is EOS"):
        audit.check(dataset, "--eval-data", allow_truncation=False)
    # who writes token ids decides about their ends
    audit.check(replace(dataset, format="tokenized"), "--data", allow_truncation=False)


def test_labels_that_are_shifted_already_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    ids = [0, 5, 6, 7, 1]
    for labels, is_right in (
        ([-100, -100, 6, 7, 1], True),
        ([5, 6, 7, 1, -100], False),
        ([-100, 6, 7, 1, -100], False),
        # somebody else's targets are nobody's mistake
        ([-100, 9, 8, 9, 8], True),
    ):
        dataset = load(tmp_path, tokenizer, *[{"input_ids": ids, "labels": labels}] * 3)
        if is_right:
            audit.check(dataset, "--data", allow_truncation=False)
        else:
            with pytest.raises(ValueError, match="must have labels that are not shifted yet"):
                audit.check(dataset, "--data", allow_truncation=False)
    same = [5] * 4
    dataset = load(tmp_path, tokenizer, {"input_ids": same, "labels": same})
    audit.check(dataset, "--data", allow_truncation=False)


def test_shared_samples_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    train = load(tmp_path, tokenizer, *PAIRS)
    other = load(tmp_path, tokenizer, PAIRS[1], PAIRS[1], {"prompt": "a", "completion": "b"})
    assert audit.num_shared(train, other) == 2
    assert audit.num_shared(other, train) == 1


def test_only_the_same_samples_go_on(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "data.json"
    facts = audit.facts_of(load(tmp_path, tokenizer, *PAIRS), tokenizer)
    others = audit.facts_of(load(tmp_path, tokenizer, *PAIRS[:-1]), tokenizer)
    path.write_text(audit.to_json({"train": facts}))
    audit.check_same(path, {"train": facts})
    with pytest.raises(ValueError, match="must be given the same samples: those of train are not"):
        audit.check_same(path, {"train": others})
    with pytest.raises(ValueError, match="those of eval are not"):
        audit.check_same(path, {"train": facts, "eval": facts})
    for content in (b"", b"[]", b'{"train": 3}', b'{"train": {}}', b"\xff"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="must find what the run learned from"):
            audit.check_same(path, {"train": facts})


def test_what_is_learned_is_made_visible(tmp_path: Path, tokenizer: Tokenizer) -> None:
    messages = say("h\u00e9, you", "yo \U0001f9ff")
    (sample,) = load(tmp_path, tokenizer, {"messages": messages}).samples
    shown = audit.show(sample, tokenizer, in_colour=False)
    assert shown == (
        "<|im_start|>user\nh\u00e9, you<|im_end|>\n<|im_start|>assistant\n"
        "[[yo \U0001f9ff<|im_end|>\n]]"
    )
    coloured = audit.show(sample, tokenizer, in_colour=True)
    assert coloured.startswith("\x1b[2m<|im_start|>user\n")
    assert coloured.endswith("\x1b[32myo \U0001f9ff<|im_end|>\n\x1b[0m")


def test_the_parts_add_up_to_the_text_wherever_the_mask_cuts(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    for each, text in (
        (tokenizer, "h\u00e9 \U0001f9ff, you"),
        (Tokenizer.from_folder(save_metaspace(tmp_path)), "hi yo\u00e9 hi"),
    ):
        ids = each.encode(text, add_special_tokens=True)
        whole = each.decode(ids, skip_special_tokens=False)
        for start in range(1, len(ids)):
            labels = [i if n >= start and n % 3 else NO_LOSS for n, i in enumerate(ids)]
            parts = list(audit.masked_text(Sample(ids, labels), each))
            assert "".join(part for _, part in parts) == whole
    # the first token is never predicted, whatever its label
    (first, *_) = audit.masked_text(Sample([5, 6], [5, 6]), tokenizer)
    assert not first[0]


def test_a_sample_does_not_command_the_terminal(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (sample,) = load(tmp_path, tokenizer, {"text": "a\x1b[2J\u202e\r\tb"}).samples
    shown = audit.show(sample, tokenizer, in_colour=False)
    assert "a\\x1b[2J\\u202e\\r\tb" in shown


def test_long_parts_are_shortened_on_demand(tmp_path: Path, tokenizer: Tokenizer) -> None:
    record = {"prompt": "#" * 5000, "completion": "!"}
    (sample,) = load(tmp_path, tokenizer, record, max_length=9000).samples
    assert "#" * 5000 in audit.show(sample, tokenizer, in_colour=False)
    short = audit.show(sample, tokenizer, in_colour=False, is_shortened=True)
    assert len(short) < 1000
    assert " characters... " in short
    assert short.endswith("[[!<|end_of_text|>]]")


def test_real_conversations_are_shown_as_they_are(assets: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(assets / "tokenizers" / "llama-3")
    line = (assets / "data" / "gsm8k_test.messages.jsonl").read_text().split("\n")[0]
    (sample,) = load(tmp_path, tokenizer, json.loads(line)).samples
    shown = audit.show(sample, tokenizer, in_colour=False)
    answer = json.loads(line)["messages"][-1]["content"]
    assert shown.endswith(f"[[{answer}<|eot_id|>]]")
    assert shown.count("<|begin_of_text|>") == 1
