"""data/chat/template_marks.py: a template of another model is known by what it writes."""

import json
from collections.abc import Collection
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT
from support.chat_cases import CHATML, say
from test_data_tokenizer import save_byte_level

from checkpoint.opening import open_checkpoint
from checkpoint.untrained_rows import untrained_rows
from data.chat.template_marks import FindUntrained, warnings
from data.dataset import load_dataset
from data.tokenizer import Tokenizer
from data.tokens.pieces import Counts

WRITTEN = Counts(num_rendered=3)


def all_trained(ids: Collection[int], others: Collection[int]) -> set[int]:
    return set()


def said(
    folder: Path,
    template: str,
    counts: Counts = WRITTEN,
    adds_bos: bool = False,
    find_untrained: FindUntrained = all_trained,
) -> str:
    save_byte_level(folder, template=template, adds_bos=adds_bos)
    return "\n".join(warnings(counts, Tokenizer.from_folder(folder), find_untrained))


@pytest.mark.parametrize(
    "mark",
    ["<|start|>", "<\uff5cUser\uff5c>", "<start_of_turn>", "<|header-3|>", "[/AVAILABLE_TOOLS]"],
)
def test_a_mark_that_is_no_token_is_named_with_counts(tmp_path: Path, mark: str) -> None:
    template = f"{{% for m in messages %}}{{{{ '{mark}' + m.role + '<|end_of_text|>' }}}}{mark}"
    template += "{% endfor %}"
    tokenizer = Tokenizer.from_folder(save_byte_level(tmp_path))
    size = len(tokenizer.encode(mark, add_special_tokens=False))
    assert size > 1
    line = said(tmp_path, template)
    assert f"marks that are no tokens of this tokenizer: {mark} is {size} tokens; records" in line
    assert "records written with it: 3;" in line
    assert "end_of_text" not in line
    assert said(tmp_path, template, Counts()) == ""


def test_a_template_of_the_tokenizers_own_tokens_is_passed_over(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}<|end_of_text|>{% endfor %}"
    assert said(tmp_path, template, adds_bos=True) == ""
    # comparisons and arrows are no marks, nor is what Llama 2 writes as plain text
    assert said(tmp_path, "{% if 1 <2 %}<|{{ messages }}|>{% endif %}<x>[INST]<<SYS>>") == ""


def test_a_template_that_leaves_bos_away_is_named(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    line = said(tmp_path, template, adds_bos=True)
    assert "does not begin with <|begin|>, with which the tokenizer begins a text; records" in line
    assert line.endswith("that begins with {{- bos_token }} (--chat-template)")
    assert said(tmp_path, template, adds_bos=False) == ""
    assert said(tmp_path, "<|begin|>" + template, adds_bos=True) == ""


@pytest.mark.parametrize(
    ("template", "is_lost"),
    [
        ("{% if not messages %}{{ bos_token }}{% endif %}{{ messages }}", True),
        ("{{ messages }}{{ bos_token }}", True),
        # a system message must come first, says this one
        ("{{ bos_token }}{{ raise_exception('no') }}", False),
        ("{{ raise_exception('no') }}", True),
    ],
    ids=["sometimes", "at-the-end", "refused-and-named", "refused-and-not-named"],
)
def test_bos_is_lost_where_a_conversation_begins_without_it(
    tmp_path: Path, template: str, is_lost: bool
) -> None:
    assert ("does not begin with <|begin|>" in said(tmp_path, template, adds_bos=True)) == is_lost


def test_each_template_counts_its_own_records(tmp_path: Path) -> None:
    save_byte_level(tmp_path, template="<|a_b|>", adds_bos=False)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("<|c_d|>")
    tokenizer = Tokenizer.from_folder(tmp_path)
    counts = Counts(num_rendered=5, num_rendered_with_tools=2)
    plain, tools = warnings(counts, tokenizer, all_trained)
    assert "<|a_b|> is" in plain
    assert "it: 3;" in plain
    assert "<|c_d|> is" in tools
    assert "it: 2;" in tools
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").unlink()
    (only,) = warnings(counts, Tokenizer.from_folder(tmp_path), all_trained)
    assert "it: 5;" in only


def test_the_bundled_model_has_its_templates_tokens() -> None:
    folder = ROOT / "bundled" / "model"
    find_untrained = partial(untrained_rows, open_checkpoint(folder))
    assert list(warnings(WRITTEN, Tokenizer.from_folder(folder), find_untrained)) == []


def test_tokens_that_the_model_was_never_trained_on_are_named(tmp_path: Path) -> None:
    written = []

    def find_untrained(ids: Collection[int], others: Collection[int]) -> set[int]:
        written.append({token for token, i in tokenizer.added_ids.items() if i in ids})
        assert set(ids) <= set(others) == set(tokenizer.added_ids.values())
        return {tokenizer.added_ids["<|im_end|>"]}

    tokenizer = Tokenizer.from_folder(save_byte_level(tmp_path))
    template = "{{ bos_token }}<|im_start|>{{ messages }}<|im_end|>"
    line = said(tmp_path, template, find_untrained=find_untrained)
    assert (
        "never trained on, whose rows of the embeddings or the head are zero or equal: <|im_"
        in line
    )
    assert "equal: <|im_end|>; records written with it: 3;" in line
    # EOS by its name; BOS is in every text that a model has seen
    said(tmp_path, template + "{{ eos_token }}", find_untrained=find_untrained)
    assert written == [
        {"<|im_start|>", "<|im_end|>"},
        {"<|im_start|>", "<|im_end|>", "<|end_of_text|>"},
    ]
    assert said(tmp_path, template, Counts(), find_untrained=find_untrained) == ""
    assert len(written) == 2


def test_conversations_need_an_eos_that_is_one_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = save_byte_level(tmp_path / "tokenizer", template=CHATML)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    # in the vocabulary, and found in no text
    content["added_tokens"] = [
        token for token in content["added_tokens"] if token["content"] != "<|end_of_text|>"
    ]
    path.write_text(json.dumps(content))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.eos_token_id is not None
    data = tmp_path / "x.jsonl"
    data.write_text(json.dumps({"messages": say("a", "b")}))
    with pytest.raises(ValueError, match=r"eos_token <\|end_of_text\|> must be one token of a t"):
        load_dataset([data], tokenizer, vocab_size=1000)
    # other samples get the id
    data.write_text(json.dumps({"prompt": "a", "completion": "b"}))
    (sample,) = load_dataset([data], tokenizer, vocab_size=1000).samples
    assert sample.input_ids[-1] == tokenizer.eos_token_id
