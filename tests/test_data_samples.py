"""data/samples.py: BOS once, EOS learned, and labels on exactly the characters to be learned."""

from pathlib import Path

import pytest
from support.chat_cases import (
    CHATML,
    INST,
    JOINED_CALLS,
    LLAMA3,
    MARKED,
    PARTS,
    call,
    say,
)
from test_data_tokenizer import save_byte_level, save_metaspace

from data.formats.examples import Conversation, PromptCompletion, Text, TokenIds
from data.samples import NO_LOSS, Sample, to_sample
from data.tokenizer import Tokenizer

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
    tokenizer = Tokenizer.from_folder(save_byte_level(folder, template=template, **options))
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


def test_every_turn_is_learned_to_its_end(tmp_path: Path) -> None:
    runs, whole = chat(tmp_path, CHATML, "hello", " yo\n", "yo", "yo", config=IM_END)
    assert runs == [" yo\n<|im_end|>\n", "yo<|im_end|>\n"]
    assert whole.endswith("<|im_end|>\n")
    assert whole.count("<|im_end|>") == 4


def test_bos_is_the_templates_and_never_two(tmp_path: Path) -> None:
    _, whole = chat(tmp_path / "a", LLAMA3, "a", "b")
    assert whole.startswith("<|begin|><|header|>")
    assert whole.count("<|begin|>") == 1
    _, whole = chat(tmp_path / "b", CHATML, "a", "b")
    # as with transformers: a template without BOS has none
    assert whole.startswith("<|im_start|>")
    _, whole = chat(tmp_path / "c", "{{ bos_token }}{{ bos_token }}" + CHATML, "a", "b")
    assert whole.count("<|begin|>") == 1


def test_eos_follows_a_last_turn_that_nothing_closes(tmp_path: Path) -> None:
    runs, whole = chat(tmp_path, LLAMA3, "hello", "you?", "a", "b")
    # this tokenizer has no <|eot|>
    assert runs == ["you?<|eot|>", "b<|eot|><|end_of_text|>"]
    after = "{% for m in messages %}#{{ m.content }}{% endfor %}|"
    runs, whole = chat(tmp_path, after, "hello", "yo")
    # what the template writes after it is kept
    assert runs == ["yo<|end_of_text|>"]
    assert whole == "#hello#yo<|end_of_text|>|"


def test_whitespace_before_the_closing_token_is_learned(tmp_path: Path) -> None:
    runs, whole = chat(tmp_path / "a", INST, "hello", "a", "b", "c")
    assert runs == [" a <|end_of_text|>", " c <|end_of_text|>"]
    assert whole.count("<|end_of_text|>") == 2


def test_a_closing_token_that_another_turn_writes_is_learned(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' and not loop.first %} {{ eos_token }}"
        "{% endif %}#{{ m.content }}{% endfor %}"
    )
    runs, whole = chat(tmp_path, template, "hello", "a", "b", "c")
    assert runs == ["#a <|end_of_text|>", "#c<|end_of_text|>"]
    assert whole == "#hello#a <|end_of_text|>#b#c<|end_of_text|>"


def test_a_token_across_the_end_of_a_turn_is_not_learned(tmp_path: Path) -> None:
    # this tokenizer has a token for ".<"
    (tmp_path / "x.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'user' %}<|{{ m.content }}|>{% else %}"
        "{{ m.content }}{% endif %}{% endfor %}"
    )
    tokenizer = Tokenizer.from_folder(save_metaspace(tmp_path), str(tmp_path / "x.jinja"))
    example = Conversation(say("hi", "yo.", "hi", "yo."), [1, 3])
    sample = to_sample(example, tokenizer, train_on="completions")
    assert learned(sample, tokenizer) == ["yo", "yo.</s>"]


def test_marked_turns_are_learned_as_marked(tmp_path: Path) -> None:
    runs, _ = chat(tmp_path, MARKED, "hello", "a", "b", "c", config=IM_END)
    assert runs == ["a<|im_end|>", "c<|im_end|>"]


def test_marks_around_the_content_alone_are_learned_with_the_closing_token(tmp_path: Path) -> None:
    template = MARKED.replace("message.content + '<|im_end|>' }}", "message.content }}").replace(
        "{{- '\n' }}", "{{- ' <|im_end|>\n' }}"
    )
    runs, _ = chat(tmp_path, template, "hello", "a", "b", "c")
    assert runs == ["a <|im_end|>", "c <|im_end|>"]


def test_a_closing_token_inside_the_marks_is_not_doubled(tmp_path: Path) -> None:
    template = MARKED.replace("'<|im_end|>' }}\n        {%- endg", "'<|im_end|>\n' }}{%- endg")
    assert template != MARKED
    runs, whole = chat(tmp_path, template, "hello", "a")
    assert runs == ["a<|im_end|>\n"]
    assert "<|end_of_text|>" not in whole


def test_an_empty_reply_is_its_closing_token(tmp_path: Path) -> None:
    runs, _ = chat(tmp_path / "a", CHATML, "hello", "", config=IM_END)
    assert runs == ["<|im_end|>\n"]
    prompt = "{% if add_generation_prompt %}<|header|>{% endif %}"
    template = "{% for m in messages %}<|header|>{{ m.content }}{% endfor %}" + prompt
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
    template = "{{ messages | map(attribute='content') | join }}"
    with pytest.raises(ValueError, match="--train-on all"):
        chat(tmp_path, template, "a", "b")
    runs, _ = chat(tmp_path, template, "a", "b", train_on="all")
    assert runs == ["ab<|end_of_text|>"]


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


def test_tools_and_variables_reach_the_template_and_choose_it(tmp_path: Path) -> None:
    folder = save_byte_level(tmp_path, template="none{{ x }}" + CHATML)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(
        "{{ tools | length }}{{ documents | length }}" + CHATML
    )
    tokenizer = Tokenizer.from_folder(folder)
    for example, beginning in (
        (Conversation(say("a", "b"), [1], variables={"x": 5}), "none5<|im_start|>"),
        (Conversation(say("a", "b"), [1], [{}, {}], {"documents": [{}]}), "21<|im_start|>"),
        # there, as in transformers, even where there are none
        (Conversation(say("a", "b"), [1], [], {"documents": []}), "00<|im_start|>"),
    ):
        for train_on in ("completions", "all"):
            sample = to_sample(example, tokenizer, train_on=train_on)
            whole = tokenizer.decode(sample.input_ids, skip_special_tokens=False)
            assert whole.startswith(beginning)
    unread = Conversation(say("a", "b"), [1], variables={"documents": []})
    with pytest.raises(ValueError, match=r"chat_template\.jinja must read .* no use of documents"):
        to_sample(unread, tokenizer, train_on="all")


def test_a_template_that_joins_arguments_to_text_learns_them(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(save_byte_level(tmp_path, template=JOINED_CALLS))
    messages = [*say("hi"), {"role": "assistant", "content": "", "tool_calls": call({"x": 1})}]
    for train_on in ("completions", "all"):
        sample = to_sample(Conversation(messages, [1]), tokenizer, train_on=train_on)
        (run,) = learned(sample, tokenizer)
        assert run.endswith('<call>add\n{"x": 1}</call><|end_of_text|>')


def test_messages_that_the_template_refuses_are_value_errors(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(save_byte_level(tmp_path, template=INST))
    messages = [{"role": "assistant", "content": "a"}]
    with pytest.raises(ValueError, match="roles must alternate"):
        to_sample(Conversation(messages, [0]), tokenizer, train_on="completions")


def test_answers_of_a_template_that_writes_parts_are_learned(tmp_path: Path) -> None:
    marked = PARTS.replace(
        "{{ part['text'] + ' ' }}",
        "{% if message['role'] == 'assistant' %}{% generation %}{{ part['text'] + ' ' }}"
        "{% endgeneration %}{% else %}{{ part['text'] + ' ' }}{% endif %}",
    )
    for name, template in (("turns", PARTS), ("marks", marked)):
        spans, whole = chat(tmp_path / name, template, "a", "first", "b", "last")
        assert whole.startswith("USER: a ASSISTANT: first USER: b ASSISTANT: last")
        assert [span.strip() for span in spans] == ["first", "last <|end_of_text|>"]
