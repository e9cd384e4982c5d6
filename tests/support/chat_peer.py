"""transformers' tokenizers and their apply_chat_template; run by `peer_process.run_peer`.

In, as metadata: the rows, the templates with their special tokens, the tokenizer folders, and the
time that it is. Out: facts.json with what became of each.
"""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import tokenizers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils


def outcome(peer: Any, row: dict[str, Any], with_prompt: bool, **options: Any) -> dict[str, Any]:
    """The text and the marked ranges of a row, or the error."""
    try:
        template = peer.get_chat_template(options.get("chat_template"), row.get("tools"))
        text = peer.apply_chat_template(
            row["messages"],
            tools=row.get("tools"),
            tokenize=False,
            add_generation_prompt=with_prompt,
            **options,
            **row.get("variables", {}),
        )
        if "{% generation" not in template and "{%- generation" not in template:
            return {"text": text}
        _, spans = chat_template_utils.render_jinja_template(
            [chat_template_utils._normalize_chat_messages(row["messages"])],
            tools=row.get("tools"),
            chat_template=template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=with_prompt,
            **{**peer.special_tokens_map, **row.get("variables", {})},
        )
        return {"text": text, "spans": spans[0]}
    except Exception as error:
        return {"error": str(error) or type(error).__name__}


def masked(peer: Any, row: dict[str, Any], template: str) -> dict[str, Any]:
    """The ids of a row's text and transformers' mask of what the assistant says."""
    encoded = peer.apply_chat_template(
        row["messages"],
        tools=row.get("tools"),
        chat_template=template,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **row.get("variables", {}),
    )
    return {"ids": encoded["input_ids"], "mask": encoded["assistant_masks"]}


def main() -> None:
    with safe_open("in.safetensors", framework="pt") as file:
        given = {key: json.loads(value) for key, value in file.metadata().items()}
    now = datetime.fromisoformat(given["now"])

    class Clock:
        @staticmethod
        def now() -> datetime:
            return now

    chat_template_utils.datetime = Clock  # pyright: ignore[reportPrivateImportUsage]
    empty = tokenizers.Tokenizer(tokenizers.models.BPE())
    facts: dict[str, Any] = {}
    for name, template in given["templates"].items():
        peer = PreTrainedTokenizerFast(tokenizer_object=empty, **given["tokens"])
        for key, row in given["rows"].items():
            for with_prompt in (False, True):
                facts[f"{name} {key} {with_prompt}"] = outcome(
                    peer, row, with_prompt, chat_template=template
                )
    for folder in given["folders"]:
        peer = AutoTokenizer.from_pretrained(folder)
        # AutoTokenizer rebuilds Llama-style normalizers; this one takes tokenizer.json as it is
        plain = PreTrainedTokenizerFast.from_pretrained(folder)
        facts[f"{folder} special"] = peer.special_tokens_map
        for key, row in given["rows"].items():
            facts[f"{folder} {key}"] = result = outcome(peer, row, False)
            if "text" in result:
                result["ids"] = plain(result["text"], add_special_tokens=False)["input_ids"]
        if folder in given["masked"]:
            template, keys = given["masked"][folder]
            for key in keys:
                facts[f"{folder} {key} mask"] = masked(plain, given["rows"][key], template)
    Path("facts.json").write_text(json.dumps(facts))
    save_file({}, "out.safetensors")


if __name__ == "__main__":
    main()
