"""data/dataset.py: what is counted, cut, dropped and refused."""

import json
from datetime import datetime
from pathlib import Path

import pytest
from support.chat_cases import CHATML, INST, say
from test_data_tokenizer import save_byte_level

from data.dataset import Dataset, load_dataset
from data.prompt import encode_prompt
from data.samples import NO_LOSS, Sample
from data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(
        save_byte_level(tmp_path_factory.mktemp("tokenizer")), chat_template="chatml"
    )


def load(folder: Path, tokenizer: Tokenizer, *records: object, **options) -> Dataset:
    path = folder / "x.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return load_dataset([path], tokenizer, **{"vocab_size": tokenizer.vocab_size, **options})


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": say("hello", "yo")}, "messages"),
        ({"conversations": [{"from": "gpt", "value": "yo"}]}, "sharegpt"),
        ({"instruction": "a", "output": "yo"}, "alpaca"),
        ({"prompt": "a", "completion": "yo"}, "prompt-completion"),
        ({"text": "yo"}, "text"),
        ({"input_ids": [5, 6], "labels": [5, 6]}, "tokenized"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_format_is_detected_or_given(
    tmp_path: Path, tokenizer: Tokenizer, record: object, expected: str
) -> None:
    detected = load(tmp_path, tokenizer, record, record)
    given = load(tmp_path, tokenizer, record, record, data_format=expected)
    assert (detected.format, detected.is_detected) == (expected, True)
    assert (given.format, given.is_detected) == (expected, False)
    assert list(detected.samples) == list(given.samples)
    assert detected.num_tokens == sum(len(s.input_ids) for s in detected.samples)
    assert detected.num_target_tokens == 2 * detected.samples[0].num_target_tokens > 0


def test_the_first_record_decides_and_the_others_must_follow(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    with pytest.raises(ValueError, match=r"x\.jsonl:2: a text record must have the field 'text'"):
        load(tmp_path, tokenizer, {"text": "a"}, {"prompt": "a", "completion": "b"})
    with pytest.raises(ValueError, match=r"x\.jsonl:1: the record's fields must be those of a"):
        load(tmp_path, tokenizer, {"question": "a"})


def test_long_samples_are_cut_and_those_without_targets_dropped(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    records = [
        {"prompt": "#", "completion": "!"},  # BOS # ! EOS
        {"prompt": "#", "completion": "!!!!"},
        {"prompt": "#######", "completion": "!"},
    ]
    dataset = load(tmp_path, tokenizer, *records, max_length=4)
    sharp, bang = tokenizer.encode("#!", add_special_tokens=False)
    assert list(dataset.samples) == [
        Sample([0, sharp, bang, 1], [NO_LOSS, NO_LOSS, bang, 1]),
        Sample([0, sharp, bang, bang], [NO_LOSS, NO_LOSS, bang, bang]),
    ]
    assert (dataset.counts.num_truncated, dataset.counts.num_dropped) == (2, 1)
    assert (dataset.num_tokens, dataset.num_target_tokens) == (8, 4)


def test_a_sample_of_max_length_is_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    dataset = load(tmp_path, tokenizer, {"text": "##"}, max_length=4)
    assert (dataset.counts.num_truncated, len(dataset.samples[0].input_ids)) == (0, 4)


def test_a_text_file_is_cut_into_pieces_and_nothing_is_lost(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = tmp_path / "x.txt"
    path.write_text("hello there, " * 40)
    dataset = load_dataset([path], tokenizer, max_length=7, vocab_size=tokenizer.vocab_size)
    ids = [*tokenizer.encode(path.read_text(), add_special_tokens=True), 1]
    predicted = [i for sample in dataset.samples for i in sample.input_ids[1:]]
    assert predicted == ids[1:]
    assert dataset.num_target_tokens == len(ids) - 1
    assert (dataset.format, dataset.counts.num_truncated, dataset.counts.num_dropped) == (
        "text",
        0,
        0,
    )


def test_nothing_to_learn_is_refused_with_counts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    record = {"prompt": "#######", "completion": "!"}
    with pytest.raises(ValueError, match=r"got 2 records without any, 2 of them cut to 4 tokens"):
        load(tmp_path, tokenizer, record, record, max_length=4)
    with pytest.raises(ValueError, match="got 1 record without any"):
        load(tmp_path, tokenizer, {"input_ids": [5, 6], "labels": [5, -100]})
    with pytest.raises(ValueError, match="got 1 record without any"):
        load(tmp_path, tokenizer, {"input_ids": [], "labels": []})


def test_a_field_that_is_named_is_the_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    dataset = load(tmp_path, tokenizer, {"body": "yo", "text": 3}, field_names={"text": "body"})
    assert list(dataset.samples) == list(load(tmp_path, tokenizer, {"text": "yo"}).samples)


def test_alpaca_becomes_a_conversation_only_with_a_template(tmp_path: Path) -> None:
    record = {"instruction": "a", "output": "yo"}
    tokenizer = Tokenizer.from_folder(save_byte_level(tmp_path))
    (sample,) = load(tmp_path, tokenizer, record).samples
    assert tokenizer.decode(sample.input_ids).endswith("### Instruction:\na\n\n### Response:yo")


def test_conversations_without_a_template_are_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(save_byte_level(tmp_path))
    with pytest.raises(ValueError, match=r"need a chat template.*--chat-template chatml"):
        load(tmp_path, tokenizer, {"messages": say("a", "b")})


def test_a_tokenizer_without_eos_is_refused_but_for_token_ids(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(save_byte_level(tmp_path, config={}))
    with pytest.raises(ValueError, match=r"must have an eos_token.*got none"):
        load(tmp_path, tokenizer, {"text": "a"})
    load(tmp_path, tokenizer, {"input_ids": [5, 6], "labels": [5, 6]})


def test_a_template_error_has_its_place(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(save_byte_level(tmp_path, template=INST))
    good, bad = say("a", "b"), [{"role": "assistant", "content": "a"}]
    place = (
        r"x\.jsonl:2: .*chat_template\.jinja: at message 0 \(role 'assistant'\) .*must alternate"
    )
    with pytest.raises(ValueError, match=place):
        load(tmp_path, tokenizer, {"messages": good}, {"messages": bad})


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{% if %}", "must be valid Jinja: got line 1"),
        ("{{ ''.__class__.__mro__ }}", "raised .*is unsafe"),
        ("{{ messages.append(1) }}", "raised .*unsafe"),
        ("{% for m in messages %}{{ m.content | nope }}{% endfor %}", "valid Jinja: .*'nope'"),
    ],
)
def test_a_bad_template_has_its_place_and_its_file(
    tmp_path: Path, template: str, match: str
) -> None:
    config: dict[str, object] = {"eos_token": "<|end_of_text|>", "chat_template": template}
    tokenizer = Tokenizer.from_folder(save_byte_level(tmp_path, config=config))
    place = r"x\.jsonl:1: .*the chat_template of .*tokenizer_config\.json"
    with pytest.raises(ValueError, match=rf"{place}.*{match}"):
        load(tmp_path, tokenizer, {"messages": say("a", "b")})


def test_a_tokenizer_beyond_the_models_vocabulary_is_refused_before_the_file_is_read(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    size = tokenizer.vocab_size
    message = rf"below the model's vocabulary of {size - 1}: got ids up to {size - 1};"
    with pytest.raises(ValueError, match=message):
        load_dataset([tmp_path / "none.jsonl"], tokenizer, vocab_size=size - 1)
    # padded to a round number
    load(tmp_path, tokenizer, {"text": "a"}, vocab_size=size + 7)


def test_an_added_token_beyond_the_models_rows_is_refused_where_a_sample_has_it(
    tmp_path: Path,
) -> None:
    folder = save_byte_level(tmp_path)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    size = len(content["model"]["vocab"])
    pad = content["added_tokens"][0] | {"id": size + 3, "content": "<|pad|>"}
    content["added_tokens"].append(pad)
    path.write_text(json.dumps(content))
    tokenizer = Tokenizer.from_folder(folder)
    pad_id = tokenizer.encode("<|pad|>", add_special_tokens=False)[0]
    assert tokenizer.vocab_size == pad_id + 1 > size == tokenizer.own_vocab_size
    records = {"text": "hello"}, {"text": "a<|pad|>"}
    load(tmp_path, tokenizer, records[0], vocab_size=size)
    message = rf"x\.jsonl:2: a sample must have tokens of the model's vocabulary of {size}: got "
    with pytest.raises(ValueError, match=rf"{message}'<\|pad\|>' \(id {pad_id}\), which was added"):
        load(tmp_path, tokenizer, *records, vocab_size=size)
    # where the model has a row for it, it is a token like another
    load(tmp_path, tokenizer, *records, vocab_size=pad_id + 1)
    assert encode_prompt("hello", tokenizer, size) == tokenizer.encode("hello", True)
    with pytest.raises(ValueError, match=r"a prompt must have tokens .* '<\|pad\|>'"):
        encode_prompt("a<|pad|>", tokenizer, size)
    # a vocabulary of another model is refused as a whole
    with pytest.raises(ValueError, match=rf"got ids up to {size - 1};"):
        load(tmp_path, tokenizer, records[0], vocab_size=size - 1)


@pytest.mark.parametrize(
    ("input_ids", "labels", "match"),
    [
        ([5, 300], [5, 6], r"input_ids\[1\] must be in \[0, 300\): got 300"),
        ([-1, 5], [5, 6], r"input_ids\[0\] must be in \[0, 300\): got -1"),
        ([-100, 5], [5, 6], r"input_ids\[0\] must be in \[0, 300\): got -100"),
        ([5, 6], [5, 300], r"labels\[1\] must be in \[0, 300\) or -100: got 300"),
        ([5, 6], [-1, 6], r"labels\[0\] must be in \[0, 300\) or -100: got -1"),
        ([5, 10**30], [5, 6], r"input_ids\[1\] must be in"),
        ([5], [5, 6], "labels must be as long as input_ids"),
    ],
)
def test_token_ids_out_of_range_are_refused_with_their_place(
    tmp_path: Path, tokenizer: Tokenizer, input_ids: list[int], labels: list[int], match: str
) -> None:
    good = {"input_ids": [5, 6], "labels": [-100, 6]}
    bad = {"input_ids": input_ids, "labels": labels}
    with pytest.raises(ValueError, match=rf"x\.jsonl:2: {match}"):
        load(tmp_path, tokenizer, good, bad, vocab_size=300)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"data_format": "chat"}, "--data-format must be auto or one of messages, .*got 'chat'"),
        ({"train_on": "prompts"}, "--train-on must be completions or all: got 'prompts'"),
        ({"max_length": 1}, "--max-length must be at least 2 tokens: got 1"),
    ],
)
def test_arguments_out_of_range_are_refused_before_the_file_is_read(
    tmp_path: Path, tokenizer: Tokenizer, options, match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        load_dataset([tmp_path / "x.jsonl"], tokenizer, vocab_size=300, **options)


def test_train_on_all_does_not_apply_to_token_ids(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="--train-on must be completions for tokenized data"):
        load(tmp_path, tokenizer, {"input_ids": [5, 6], "labels": [5, 6]}, train_on="all")


def test_the_same_clock_gives_the_same_samples(tmp_path: Path) -> None:
    template = "{{ strftime_now('%d') }}" + CHATML
    tokenizer = Tokenizer.from_folder(save_byte_level(tmp_path, template=template))
    record = {"messages": say("a", "b")}
    first, again, later = (
        list(load(tmp_path, tokenizer, record, now=datetime(2024, 7, day)).samples)
        for day in (26, 26, 27)
    )
    assert first == again != later
