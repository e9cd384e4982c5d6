"""data/samples.py: BOS once, EOS learned, and labels on exactly the characters to be learned."""

from pathlib import Path

import pytest
from test_data_chat_template import INST, LLAMA3, MARKED, say
from test_data_tokenizer import save_byte_level, save_metaspace

from data.chat_template import load_template
from data.formats import Conversation, PromptCompletion, Text, TokenIds
from data.samples import NO_LOSS, Sample, cut_document, to_sample
from data.tokenizer import Tokenizer

CHATML = load_template("chatml")
IM_END = {"bos_token": None, "eos_token": "<|im_end|>"}


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(save_byte_level(tmp_path_factory.mktemp("byte-level")))


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(save_metaspace(tmp_path_factory.mktemp("metaspace")))


def learned(sample: Sample, tokenizer: Tokenizer) -> list[str]:
    """The runs of consecutive labelled tokens, as text with special tokens."""
    assert len(sample.labels) == len(sample.input_ids)
    runs: list[list[int]] = [[]]
    for token_id, label in zip(sample.input_ids, sample.labels, strict=True):
        assert label in (token_id, NO_LOSS)
        if label == NO_LOSS:
            runs.append([])
        else:
            runs[-1].append(label)
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs if run]


def chat(
    folder: Path, template: str, *contents: str, train_on: str = "completions", **options
) -> tuple[list[str], str]:
    """What is learned of a conversation, and the whole sample, both as text."""
    tokenizer = Tokenizer.from_folder(save_byte_level(folder, **options), chat_template=template)
    messages = say(*contents)
    replies = list(range(1, len(messages), 2))
    sample = to_sample(Conversation(messages, replies), tokenizer, train_on=train_on)
    whole = tokenizer.decode(sample.input_ids, skip_special_tokens=False)
    return learned(sample, tokenizer), whole


@pytest.mark.parametrize("adds_eos", [True, False])
@pytest.mark.parametrize("ending", ["", "<|end_of_text|>"])
def test_a_text_has_one_bos_unlearned_and_one_eos_learned(
    tmp_path: Path, adds_eos: bool, ending: str
) -> None:
    tokenizer = Tokenizer.from_folder(save_byte_level(tmp_path, adds_eos=adds_eos))
    sample = to_sample(Text("hello there" + ending), tokenizer, train_on="completions")
    inner = tokenizer.encode("hello there", add_special_tokens=False)
    assert sample == Sample([0, *inner, 1], [NO_LOSS, *inner, 1])


def test_a_text_that_spells_out_bos_has_one(byte_level: Tokenizer) -> None:
    sample = to_sample(Text("<|begin|>hello"), byte_level, train_on="completions")
    assert sample.input_ids.count(0) == 1


def test_no_bos_where_the_tokenizer_adds_none(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(save_byte_level(tmp_path, adds_bos=False))
    ids = [*tokenizer.encode("hello", add_special_tokens=False), 1]
    assert to_sample(Text("hello"), tokenizer, train_on="completions") == Sample(ids, ids)


@pytest.mark.parametrize("example", [Text(""), PromptCompletion("", "")])
def test_nothing_has_nothing_to_learn(byte_level: Tokenizer, example) -> None:
    sample = to_sample(example, byte_level, train_on="completions")
    assert sample == Sample([0], [NO_LOSS])
    assert sample.num_target_tokens == 0


def test_a_completion_is_learned_with_eos_and_its_prompt_is_not(byte_level: Tokenizer) -> None:
    example = PromptCompletion("hello\n", " there \U0001f9ff\n")
    sample = to_sample(example, byte_level, train_on="completions")
    assert learned(sample, byte_level) == [" there \U0001f9ff\n<|end_of_text|>"]
    assert sample.input_ids[:-1] == byte_level.encode("hello\n there \U0001f9ff\n", True)
    everything = to_sample(example, byte_level, train_on="all")
    assert everything.labels == [NO_LOSS, *sample.input_ids[1:]]


def test_a_token_across_the_start_of_the_completion_is_learned(metaspace: Tokenizer) -> None:
    sample = to_sample(PromptCompletion("a h", "i b"), metaspace, train_on="completions")
    assert learned(sample, metaspace) == ["hi b</s>"]


def test_an_empty_completion_is_eos(byte_level: Tokenizer) -> None:
    sample = to_sample(PromptCompletion("hello", ""), byte_level, train_on="completions")
    assert learned(sample, byte_level) == ["<|end_of_text|>"]


def test_bytes_of_one_character_are_learned_together(metaspace: Tokenizer) -> None:
    sample = to_sample(
        PromptCompletion("\U0001f9ff", "\U0001f9ff"), metaspace, train_on="completions"
    )
    assert sample.num_target_tokens == 4 + 1


def test_closing_tokens_of_every_turn_are_learned_and_what_follows_is_not(tmp_path: Path) -> None:
    runs, whole = chat(tmp_path, CHATML, "hello", " yo\n", "yo", "yo", config=IM_END)
    assert runs == [" yo\n<|im_end|>", "yo<|im_end|>"]
    assert whole.endswith("<|im_end|>\n")
    assert whole.count("<|im_end|>") == 4


def test_bos_of_template_and_tokenizer_is_one(tmp_path: Path) -> None:
    _, whole = chat(tmp_path / "a", LLAMA3, "a", "b")
    assert whole.startswith("<|begin|><|header|>")
    assert whole.count("<|begin|>") == 1
    _, whole = chat(tmp_path / "b", CHATML, "a", "b")
    assert whole.startswith("<|begin|><|im_start|>")
    _, whole = chat(tmp_path / "c", "{{ bos_token }}{{ bos_token }}" + CHATML, "a", "b")
    assert whole.count("<|begin|>") == 1


def test_eos_follows_a_last_turn_that_nothing_closes(tmp_path: Path) -> None:
    runs, whole = chat(tmp_path, LLAMA3, "hello", "you?", "a", "b")
    assert runs == ["you?", "b<|end_of_text|>"]
    # what the template writes after it is kept
    assert whole.endswith("b<|end_of_text|><|eot|>")


def test_whitespace_before_the_closing_token_is_learned(tmp_path: Path) -> None:
    runs, whole = chat(tmp_path, INST, "hello", "a", "b", "c")
    assert runs == ["a <|end_of_text|>", "c <|end_of_text|>"]
    assert whole.count("<|end_of_text|>") == 2


def test_a_token_across_the_end_of_a_turn_is_not_learned(tmp_path: Path) -> None:
    # this tokenizer has no <|im_end|> and a token for ".<"
    tokenizer = Tokenizer.from_folder(save_metaspace(tmp_path), chat_template=CHATML)
    example = Conversation(say("hi", "yo.", "hi", "yo."), [1, 3])
    sample = to_sample(example, tokenizer, train_on="completions")
    assert learned(sample, tokenizer) == ["yo", "yo.</s>"]


def test_marked_turns_are_learned_as_marked(tmp_path: Path) -> None:
    runs, _ = chat(tmp_path, MARKED, "hello", "a", "b", "c", config=IM_END)
    assert runs == ["a<|im_end|>", "c<|im_end|>"]


def test_a_closing_token_inside_the_marks_is_not_doubled(tmp_path: Path) -> None:
    template = MARKED.replace("'<|im_end|>' }}\n        {%- endg", "'<|im_end|>\n' }}{%- endg")
    assert template != MARKED
    runs, whole = chat(tmp_path, template, "hello", "a")
    assert runs == ["a<|im_end|>\n"]
    assert "<|end_of_text|>" not in whole


def test_an_empty_reply_is_its_closing_token(tmp_path: Path) -> None:
    runs, _ = chat(tmp_path / "a", CHATML, "hello", "", config=IM_END)
    assert runs == ["<|im_end|>"]
    template = "{% for m in messages %}<|header|>{{ m.content }}{% endfor %}"
    runs, whole = chat(tmp_path / "b", template, "hello", "")
    assert runs == ["<|end_of_text|>"]
    assert whole.endswith("<|header|><|end_of_text|>")


def test_all_learns_everything_but_bos_and_ends_in_eos(tmp_path: Path) -> None:
    runs, whole = chat(tmp_path / "a", CHATML, "a", "b", train_on="all", config=IM_END)
    assert runs == [whole]
    assert whole.endswith("b<|im_end|>\n")
    runs, whole = chat(tmp_path / "b", LLAMA3, "a", "b", train_on="all")
    assert "<|begin|>" + runs[0] == whole
    assert whole.endswith("<|eot|><|end_of_text|>")


def test_all_needs_no_locatable_replies(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content | upper }}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="--train-on all"):
        chat(tmp_path, template, "a", "b")
    runs, _ = chat(tmp_path, template, "a", "b", train_on="all")
    assert runs == ["AaBb<|end_of_text|>"]


def test_a_prompt_token_that_swallows_whitespace_is_not_learned(tmp_path: Path) -> None:
    folder = save_byte_level(tmp_path)
    content = (folder / "tokenizer.json").read_text()
    start = content.index('"<|header|>"')
    changed = content[start:].replace('"rstrip": false', '"rstrip": true', 1)
    (folder / "tokenizer.json").write_text(content[:start] + changed)
    tokenizer = Tokenizer.from_folder(folder)
    example = PromptCompletion("hello<|header|>\n", " there")
    sample = to_sample(example, tokenizer, train_on="completions")
    assert tokenizer.encode("<|header|>\n there", False) == tokenizer.encode(
        "<|header|>there", False
    )
    assert learned(sample, tokenizer) == ["there<|end_of_text|>"]


def test_token_ids_are_taken_as_they_are(byte_level: Tokenizer) -> None:
    example = TokenIds([5, 6, 7], [9, NO_LOSS, 7])
    sample = to_sample(example, byte_level, train_on="completions")
    assert sample == Sample([5, 6, 7], [9, NO_LOSS, 7])
    # the label at position 0 is never predicted
    assert sample.num_target_tokens == 1


@pytest.mark.parametrize("length", [2, 3, 4, 9, 10, 11])
def test_pieces_of_a_document_predict_every_token_once(length: int) -> None:
    ids = list(range(10, 20))
    pieces = cut_document(Sample(ids, [NO_LOSS, *ids[1:]]), length)
    assert all(2 <= len(piece.input_ids) <= length for piece in pieces)
    assert all(piece.labels == [NO_LOSS, *piece.input_ids[1:]] for piece in pieces)
    assert [label for piece in pieces for label in piece.labels[1:]] == ids[1:]
    starts = [piece.input_ids[0] for piece in pieces[1:]]
    assert starts == [piece.input_ids[-1] for piece in pieces[:-1]]


def test_messages_that_the_template_refuses_are_value_errors(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(save_byte_level(tmp_path), chat_template=INST)
    messages = [{"role": "assistant", "content": "a"}]
    with pytest.raises(ValueError, match="roles must alternate"):
        to_sample(Conversation(messages, [0]), tokenizer, train_on="completions")
