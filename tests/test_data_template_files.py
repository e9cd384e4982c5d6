"""data/chat/template_files.py: which template counts, and what is no template."""

import json
from pathlib import Path

import pytest

from data.chat.template_files import NamedText, checkpoint_templates, choose_templates

CONFIG = Path("tokenizer_config.json")


def own(folder: Path, template: object = None) -> dict[str, NamedText]:
    return checkpoint_templates(folder, {"chat_template": template}, folder / CONFIG)


def texts(templates: dict[str, NamedText]) -> dict[str, str]:
    return {name: template.text for name, template in templates.items()}


def write_files(folder: Path, *names: str) -> None:
    (folder / "additional_chat_templates").mkdir()
    for name in names:
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(name)


def test_the_configuration_has_one_template_or_several(tmp_path: Path) -> None:
    assert own(tmp_path) == {}
    assert texts(own(tmp_path, "a")) == {"default": "a"}
    named = [{"name": "default", "template": "d"}, {"name": "rag", "template": "r"}]
    assert texts(own(tmp_path, named)) == {"default": "d", "rag": "r"}


def test_files_beat_the_configuration_altogether(tmp_path: Path) -> None:
    write_files(tmp_path, "rag", "tool_use")
    assert texts(own(tmp_path, "not this")) == {"rag": "rag", "tool_use": "tool_use"}
    (tmp_path / "chat_template.jinja").write_text("caf\u00e9", encoding="utf-8")
    expected = {"default": "caf\u00e9", "rag": "rag", "tool_use": "tool_use"}
    assert texts(own(tmp_path, "not this")) == expected


@pytest.mark.parametrize(
    "template",
    [3, {"default": "d"}, ["d"], [{"name": "default"}], [{"name": 1, "template": "d"}]],
    ids=json.dumps,
)
def test_what_is_no_template_is_refused_with_its_file(tmp_path: Path, template: object) -> None:
    with pytest.raises(ValueError, match=r"the chat_template of .*config\.json must be"):
        own(tmp_path, template)


def test_a_choice_is_bundled_or_a_file_or_the_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("m")
    write_files(tmp_path, "rag")

    def choose(choice: str) -> NamedText:
        (chosen,) = choose_templates(choice, tmp_path, {}, tmp_path / CONFIG).values()
        return chosen

    assert choose("chatml").name == "the bundled chat template chatml"
    path = tmp_path / "mine.jinja"
    assert choose(str(path)) == NamedText("m", f"the chat template {path}")
    assert choose("rag").text == "rag"
    unknown = (
        r"bundled template \(chatml, .* of the checkpoint \(rag\): got 'chatlm'; did you mean "
    )
    with pytest.raises(ValueError, match=unknown + r"chatml\?$"):
        choose("chatlm")
    with pytest.raises(ValueError, match=r"did you mean llama-3\.1 or llama-3\?$"):
        choose("Llama-3.1-chat")
    with pytest.raises(ValueError, match=r"got 'xyz'$"):
        choose("xyz")


def test_a_bundled_template_comes_before_one_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, "qwen", "rag")
    Path("qwen").write_text("a file")
    Path("rag").write_text("a file")

    def name_of(choice: str) -> str:
        return choose_templates(choice, tmp_path, {}, tmp_path / CONFIG)["default"].name

    assert name_of("qwen") == "the bundled chat template qwen"
    assert name_of("./qwen") == "the chat template ./qwen"
    assert name_of("rag") == "the chat template rag"


def test_a_choice_makes_up_for_a_broken_checkpoint(tmp_path: Path) -> None:
    chosen = choose_templates("chatml", tmp_path, {"chat_template": 3}, tmp_path / CONFIG)
    assert list(chosen) == ["default"]


def test_bytes_that_are_not_text_are_refused_with_their_file(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja must be UTF-8"):
        own(tmp_path)


def test_a_processors_template_comes_last(tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text('{"chat_template": "of the processor"}')
    assert texts(own(tmp_path)) == {"default": "of the processor"}
    assert own(tmp_path)["default"].name == f"the chat_template of {tmp_path}/chat_template.json"
    assert texts(own(tmp_path, "of the tokenizer")) == {"default": "of the tokenizer"}
