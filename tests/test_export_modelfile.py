"""export/chat_turns.py and export/modelfile.py: a chat template's fixed texts, written for Ollama.

The templates in Go's language below were run with Go 1.19's text/template on the conversations of
`CONVERSATIONS`, and wrote what Jinja writes.
"""

from pathlib import Path

import pytest
from conftest import ROOT

from data.chat.template import ChatTemplate
from data.chat.template_files import BUNDLED_TEMPLATES
from data.tokenizer import Tokenizer
from export.chat_turns import begins_with, find_turns
from export.modelfile import go_template, stops_of, write_modelfile

MODEL = ROOT / "bundled" / "model"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' }}"
    "{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# SmolLM's and Qwen 2.5's way
WITH_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}"
    "{% endif %}" + CHATML
)
LLAMA_3 = (
    "{% for m in messages %}{% set text = '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = messages[0]['content'] %}{% else %}{% set rest = messages %}"
    "{% set system = false %}{% endif %}{% for m in rest %}"
    "{% if loop.index0 == 0 and system %}"
    "{% set text = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] %}"
    "{% else %}{% set text = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + text + ' [/INST]' }}"
    "{% else %}{{ ' ' + text + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}"
    "{% for m in rest %}{% if m.role == 'user' %}"
    "{% if loop.last and system %}{{ '[INST] ' + system + '\\n\\n' + m.content + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{% for m in messages %}"
    "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
# EOS is written where no answer is asked for
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
CONVERSATIONS = [
    [*system, *turns]
    for system in ([], [{"role": "system", "content": "You are brief."}])
    for turns in (
        [{"role": "user", "content": "one?"}],
        [
            {"role": "user", "content": "one?"},
            {"role": "assistant", "content": "One."},
            {"role": "user", "content": "two?"},
        ],
    )
]


@pytest.mark.parametrize("path", sorted(BUNDLED_TEMPLATES.glob("*.jinja")), ids=lambda p: p.stem)
def test_every_bundled_template_can_be_written_for_ollama(path: Path) -> None:
    turns = find_turns(ChatTemplate(path.read_text(), "x", SPECIAL))
    assert turns is not None
    assert go_template(turns, "<s>")


@pytest.mark.parametrize(
    "text",
    [CHATML, WITH_DEFAULT, LLAMA_3, LLAMA_2, MISTRAL, GEMMA, PHI_3],
    ids=["ChatML", "default system", "Llama 3", "Llama 2", "Mistral", "Gemma", "Phi-3"],
)
def test_the_turns_write_what_the_template_does(text: str) -> None:
    template = ChatTemplate(text, "the template", SPECIAL)
    turns = find_turns(template)
    assert turns is not None
    for messages in CONVERSATIONS:
        if text == GEMMA and messages[0]["role"] == "system":
            written = turns.write(messages)
            assert "<start_of_turn>user\nYou are brief.\n\none?<end_of_turn>\n" in written
        else:
            assert turns.write(messages) == template.render(messages, add_generation_prompt=True)


ANSWER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
WRITTEN = {
    "ChatML": (
        CHATML,
        None,
        '{{ range $i, $_ := .Messages }}{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}'
        '<|im_end|>\n{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}'
        '<|im_end|>\n{{ else if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        "{{ end }}{{ end }}<|im_start|>assistant\n",
    ),
    "default system": (
        WITH_DEFAULT,
        None,
        "{{ if not .System }}<|im_start|>system\nBe kind.<|im_end|>\n{{ end }}"
        '{{ range $i, $_ := .Messages }}{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}'
        '<|im_end|>\n{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}'
        '<|im_end|>\n{{ else if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        "{{ end }}{{ end }}<|im_start|>assistant\n",
    ),
    "Llama 3, BOS by llama.cpp": (
        LLAMA_3,
        "<s>",
        '{{ range $i, $_ := .Messages }}{{ if eq .Role "user" }}<|start_header_id|>user'
        '<|end_header_id|>\n\n{{ .Content }}<|eot_id|>{{ else if eq .Role "assistant" }}'
        f"{ANSWER}{{{{ .Content }}}}<|eot_id|>"
        '{{ else if eq .Role "system" }}<|start_header_id|>system<|end_header_id|>\n\n'
        "{{ .Content }}<|eot_id|>{{ end }}{{ end }}" + ANSWER,
    ),
    "Llama 2, BOS in every turn and by llama.cpp": (
        LLAMA_2,
        "<s>",
        '{{ range $i, $_ := .Messages }}{{ if eq .Role "user" }}'
        "{{ if or (gt $i 1) (and $i (not $.System)) }}<s>{{ end }}[INST] "
        "{{ if and $.System (eq $i 1) }}<<SYS>>\n{{ $.System }}\n<</SYS>>\n\n{{ end }}"
        '{{ .Content }} [/INST]{{ else if eq .Role "assistant" }} {{ .Content }} </s>'
        "{{ end }}{{ end }}",
    ),
    "Mistral": (
        MISTRAL,
        None,
        '<s>{{ range $i, $_ := .Messages }}{{ if eq .Role "user" }}[INST] '
        "{{ if and $.System (eq (len (slice $.Messages $i)) 1) }}{{ $.System }}\n\n{{ end }}"
        '{{ .Content }}[/INST]{{ else if eq .Role "assistant" }} {{ .Content }}</s>'
        "{{ end }}{{ end }}",
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_the_template_in_gos_language(name: str) -> None:
    text, bos, expected = WRITTEN[name]
    turns = find_turns(ChatTemplate(text, "the template", SPECIAL))
    assert turns is not None
    assert go_template(turns, bos) == expected


@pytest.mark.parametrize(
    "text",
    [
        "{{ strftime_now('%d %b') }}" + CHATML,
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{{ messages | length }}" + CHATML,
        "{% for m in messages | reverse %}[{{ m.role }}]{{ m.content }}{% endfor %}",
        "{{ raise_exception('never') }}",
        "{% for m in messages %}[{{ loop.index }}]{{ m.content }}{% endfor %}",
    ],
    ids=["date", "upper", "length", "reverse", "refuses", "numbers"],
)
def test_a_template_without_fixed_texts_has_no_turns(text: str) -> None:
    assert find_turns(ChatTemplate(text, "the template", SPECIAL)) is None


def test_texts_that_go_would_run_or_a_modelfile_would_lose_are_not_written() -> None:
    for text in ("{{", "}}", "x{", '"""', 'x"', "\u200b"):
        code = f"{{% raw %}}{text}{{% endraw %}}" + CHATML
        turns = find_turns(ChatTemplate(code, "the template", SPECIAL))
        assert turns is not None
        assert turns.begin == text
        assert go_template(turns, None) is None


def test_a_template_begins_with_bos_or_not() -> None:
    for text, begins in ((LLAMA_3, True), (LLAMA_2, True), (CHATML, False), ("{{ x.y }}", False)):
        assert begins_with(ChatTemplate(text, "the template", SPECIAL), "<s>") is begins


def test_the_modelfile_names_file_template_and_stops() -> None:
    stops = ["<|im_end|>", 'a"\\', "<|\u200b|>", 'b"']
    text = write_modelfile("model-f16.gguf", "{{ .Content }}\n", stops)
    assert text == (
        'FROM ./model-f16.gguf\nTEMPLATE """{{ .Content }}\n"""\n'
        'PARAMETER stop "<|im_end|>"\nPARAMETER stop """a"\\"""\n'
    )
    assert write_modelfile("m.gguf", None, []) == "FROM ./m.gguf\n"
    text = write_modelfile("m.gguf", None, ["<s>"], 'You say "no".\nAlways.')
    assert text == ('FROM ./m.gguf\nSYSTEM """You say "no".\nAlways."""\nPARAMETER stop "<s>"\n')


def test_stops_are_the_templates_and_the_models_each_once() -> None:
    tokenizer = Tokenizer.from_folder(MODEL)
    turns = find_turns(tokenizer.chat_template())
    assert stops_of(turns, tokenizer, (1,)) == ["<|im_end|>"]
    phi = find_turns(ChatTemplate(PHI_3, "the template", SPECIAL))
    # 5 is no added token, and ends nothing as a text
    assert stops_of(phi, tokenizer, (0, 5)) == ["<|end|>", "<|im_start|>", "<|im_end|>"]
    assert stops_of(None, tokenizer, ()) == ["<|im_end|>"]


def test_the_bundled_template_is_not_written_twice_with_its_bos() -> None:
    template = Tokenizer.from_folder(MODEL).chat_template()
    turns = find_turns(template)
    assert turns is not None
    written = go_template(turns, "<|im_start|>")
    assert written is not None
    assert written.count("{{ if $i }}<|im_start|>{{ end }}") == 3
