"""Conversations and templates that the tests of rendering and of spans share."""

from pathlib import Path
from typing import Any

from data.chat.template import ChatTemplate
from data.chat.template_files import BUNDLED_TEMPLATES

CHATML = (BUNDLED_TEMPLATES / "chatml.jinja").read_text()
LLAMA3 = (
    "{% for message in messages %}"
    "{% set content = '<|header|>' + message['role'] + '<|/header|>\n\n'"
    " + message['content'] | trim + '<|eot|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\n\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MARKED = (
    "{%- for message in messages %}\n"
    "    {%- if message.role == 'assistant' %}\n"
    "        {{- '<|im_start|>assistant\n' }}\n"
    "        {%- generation %}\n"
    "            {{- message.content + '<|im_end|>' }}\n"
    "        {%- endgeneration %}\n"
    "        {{- '\n' }}\n"
    "    {%- else %}\n"
    "        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# block trimming, loop controls, macros, JSON, tools, and content-dependent turns, as Qwen 3 has
# them
INTRICATE = """{% if tools %}
    {{ tools | tojson(indent=2) }}
{% endif %}
{% macro say(role, text) %}
[{{ role }}] {{ text }}
{% endmacro %}
{% set ns = namespace(last=-1) %}
{% for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}
{% endif %}{% endfor %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
    {{- say(message.role, content) }}
    {%- if message.extra is defined %}{{ message.extra | tojson }}{% endif %}
    {%- if loop.index0 > ns.last and message.role == 'assistant' %}{{ '(last)' }}{% endif %}
{%- endfor %}
{{ unk_token }}{{ strftime_now('%Y') }}
"""
# the prompt inside of the loop, and whitespace that is the template's own, as Zephyr has them
IN_THE_LOOP = (
    "{% for message in messages %}\n"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    "{% endfor %}"
)
# a prompt that earlier turns do not begin with, and that depends on the messages, as DeepSeek's
REASONER = (
    "{% set ns = namespace(system='', after_tool=false) %}"
    "{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content %}{% endif %}"
    "{% endfor %}{{ bos_token }}{{ ns.system }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% endif %}"
    "{% if m.role == 'tool' %}{{ '<|result|>' + m.content }}{% set ns.after_tool = true %}"
    "{% endif %}{% if m.role == 'assistant' %}{% if ns.after_tool %}"
    "{{ '<|/result|>' + m.content + eos_token }}{% set ns.after_tool = false %}{% else %}"
    "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endif %}"
    "{% endfor %}{% if ns.after_tool %}{{ '<|/result|>' }}"
    "{% elif add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
# the calls of DeepSeek R1's template: its arguments join other text
JOINED_CALLS = (
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c['function']['name'] + '\n' + c['function']['arguments'] + '</call>' }}"
    "{% endfor %}{% endfor %}"
)
# contents are lists of parts, as LLaVA's templates want them: of a text they write nothing
PARTS = (
    "{% for message in messages %}{{ message['role'] | upper + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# parts reasoning and words by a control token, as gpt-oss's; the tokens are ChatML's
CHANNELS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.reasoning_content %}"
    "{{ '<|im_start|>' + m.reasoning_content }}{% endif %}"
    "{{ '<|im_end|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "inst": INST,
    "marked": MARKED,
    "intricate": INTRICATE,
    "in-the-loop": IN_THE_LOOP,
    "reasoner": REASONER,
}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def make(text: str, name: str = "the chat template x.jinja") -> ChatTemplate:
    return ChatTemplate(text, name, TOKENS)


def say(*contents: str) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


# say() gives user and assistant in turn
CONVERSATIONS = {
    "one-turn": say("hi", "yo"),
    "equal-messages": say("yo", "yo", "yo", "yo"),
    "whitespace": say("  hi\n", "\n\n  yo \n", " ", "yo\n"),
    "empty": say("hi", "", "hi", "yo"),
    "content-like-the-template": say("<|im_end|>", "assistant\nyo<|im_end|>", "[/INST]", "user"),
    "markup": say("a < b & 'c' \"d\"", "{{ messages }} {% if %} <|x|>"),
    "unicode": say("caf\u00e9 \u4f60\u597d", "\U0001f9ff\u2028\ue000\ue001"),
    "thinking": say("hi", "<think>\nhm\n</think>\n\nyo", "and?", "no"),
}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Say <b>what</b> & \u00e9",
            "parameters": {
                "type": "object",
                "properties": {"x": {"type": "integer"}, "y": {"type": ["string", "null"]}},
                "required": ["x"],
            },
        },
    }
    for name in ("add", "ask")
]


def call(*arguments: object) -> list[dict[str, Any]]:
    return [
        {
            "id": f"call0000{i}",
            "type": "function",
            "function": {"name": "add", "arguments": arguments[i]},
        }
        for i in range(len(arguments))
    ]


SYSTEM = {"role": "system", "content": " Be <brief>. \n"}
RESULT = {"role": "tool", "name": "add", "content": "3", "tool_call_id": "call00000"}
CALL = {"role": "assistant", "content": None, "tool_calls": call({"x": 1, "y": "<\u00e9>"})}
USED = [*say("add"), CALL, RESULT, {"role": "assistant", "content": "It is 3."}]

# what a row of a data set can ask for: messages, and what else the template sees
Row = dict[str, Any]
ROWS: dict[str, Row] = {
    **{name: {"messages": messages} for name, messages in CONVERSATIONS.items()},
    "system": {"messages": [SYSTEM, *say("hi", "yo", "and", "no")]},
    "system-only-later": {"messages": [*say("hi", "yo"), SYSTEM, *say("and", "no")]},
    "tools": {"messages": USED, "tools": TOOLS},
    "tools-twice": {"messages": [SYSTEM, *USED, *say("thanks", "ok"), *USED], "tools": TOOLS},
    "no-tools": {"messages": USED, "tools": []},
    "calls-without-tools": {"messages": USED},
    "text-and-call": {
        "messages": [*say("add"), {**CALL, "content": "so"}, RESULT, *say("x", "y")[1:]],
        "tools": TOOLS[:1],
    },
    "two-calls": {
        "messages": [
            *say("add"),
            {"role": "assistant", "content": "", "tool_calls": call({"x": 1}, '{"x": 2}')},
            RESULT,
            {**RESULT, "tool_call_id": "call00001"},
            {"role": "assistant", "content": "3 and 3"},
        ],
        "tools": TOOLS,
    },
    "ipython": {"messages": [*say("add"), CALL, {"role": "ipython", "content": "3"}]},
    "reasoning": {
        "messages": [
            *say("hi"),
            {"role": "assistant", "content": "yo", "reasoning_content": "hm\n"},
            *say("and"),
            {"role": "assistant", "content": "no", "thinking": "so <so>"},
        ]
    },
    "reasoning-and-call": {
        "messages": [
            *say("add"),
            {**CALL, "reasoning": "a sum"},
            RESULT,
            {"role": "assistant", "content": "3", "reasoning_content": "easy"},
        ],
        "tools": TOOLS,
    },
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": " a "}]},
            {
                "role": "assistant",
                "content": [{"type": "text", "text": " b "}, {"type": "text", "text": "c"}],
            },
        ]
    },
    "assistant-first": {"messages": [*say("x", "hi")[1:], *say("a", "b")]},
    "two-users": {"messages": [*say("a"), *say("b", "c")]},
    "two-assistants": {"messages": [*say("a", "b"), *say("x", "c")[1:]]},
    "no-thinking": {
        "messages": say("a", "b", "c", "d"),
        "variables": {"enable_thinking": False},
    },
    "options": {
        "messages": USED,
        "tools": TOOLS,
        "variables": {
            "date_string": "1 Jan 2025",
            "tools_in_user_message": False,
            "documents": [{"title": "t", "text": "<x>"}],
        },
    },
    "builtin": {"messages": USED, "variables": {"builtin_tools": ["add", "code_interpreter"]}},
    "custom": {"messages": USED, "variables": {"custom_tools": TOOLS[1:]}},
    "extra": {"messages": [{**m, "name": "n", "extra": {"<": 1}} for m in say("hi", "yo")]},
    "user-last": {"messages": say("a", "b", "c")},
}


def asset_templates(assets: Path) -> dict[str, str]:
    """Every chat template file of the assets, by its path."""
    paths = sorted([*assets.glob("templates/**/*.jinja"), *assets.glob("tokenizers/**/*.jinja")])
    return {path.relative_to(assets).as_posix(): path.read_text() for path in paths}
