"""run/model_card.py: the hub reads its front matter, which is PEFT's; its figures are the run's."""

import ast
import json
import re
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import pytest
from huggingface_hub import ModelCard
from support.llama_peers import tiny_peer

from run.config import TrainConfig
from run.metrics import GIB, Row
from run.model_card import model_card
from run.usage import Usage


def row(step: int, tokens: int, target_tokens: int, gib: float, **known: Any) -> Row:
    return {
        "step": step,
        "epoch": step / 2,
        "tokens": tokens,
        "target_tokens": target_tokens,
        "peak_memory_bytes": int(gib * GIB),
        **known,
    }


ROWS = [
    row(0, 0, 0, 0.5, eval_loss=3.0),
    row(1, 1000, 400, 3, loss=2.5, tokens_per_second=100.0),
    row(2, 2000, 900, 1, loss=1.0, tokens_per_second=500.0),
    row(3, 3500, 1200, 1, loss=1.25, eval_loss=2.0, tokens_per_second=300.0),
]
FLAGS: dict[str, Any] = {"model": "/somewhere/else", "data": "/somewhere/private/chats.jsonl"}
USAGE = Usage(
    adapter="/somewhere/out",
    merged="/somewhere/out-merged",
    base="/somewhere/else",
    revision=None,
    rank=7,
    is_chat=True,
    misreaders=(),
    has_gguf=True,
)
FILES = ["adapter_model.safetensors", "adapter_config.json", "tokenizer.json"]


def card_of(
    rows: list[Row] = ROWS,
    base: str = "owner/base-1B",
    files: list[str] = FILES,
    *,
    is_on_hub: bool = True,
    usage: Usage = USAGE,
    **changes: Any,
) -> tuple[dict[str, Any], str]:
    """The front matter as the hub parses it, and the text after it."""
    config = TrainConfig(**(FLAGS | changes))
    card = ModelCard(model_card(config, rows, files, base, usage, is_on_hub=is_on_hub))
    return card.data.to_dict(), card.text


def test_a_family_that_llama_cpp_has_not_is_merged_without_ollama() -> None:
    _, text = card_of(usage=replace(USAGE, has_gguf=False))
    assert "Quatrain:\n\n```bash\npython merge.py" in text
    assert not any(word in text.lower() for word in ("ollama", "gguf", "modelfile"))


def test_the_front_matter_is_pefts(tmp_path_factory: pytest.TempPathFactory) -> None:
    peer = tiny_peer(tmp_path_factory, "grouped-query")
    theirs = ModelCard.load(peer.folder / "peft_adapter" / "README.md").data.to_dict()
    ours, _ = card_of(quant="none")
    base = theirs["base_model"]
    assert base == str(peer.checkpoint)
    expected = theirs | {"base_model": "owner/base-1B"}
    expected["tags"] = [tag.replace(base, "owner/base-1B") for tag in theirs["tags"]]
    assert ours == expected


def test_qlora_has_a_tag_of_its_own() -> None:
    ours, _ = card_of()
    assert ours["tags"] == ["base_model:adapter:owner/base-1B", "lora", "qlora", "transformers"]


def test_a_revision_is_no_part_of_the_hubs_id() -> None:
    ours, text = card_of(base="owner/base-1B@v2")
    assert ours["base_model"] == "owner/base-1B"
    assert "base_model:adapter:owner/base-1B" in ours["tags"]
    assert "\nvllm serve owner/base-1B --revision v2 --tokenizer path/to/this/folder --" in text
    assert "base_model_name_or_path" not in text


def test_a_base_model_from_the_disk_is_not_given_to_the_hub() -> None:
    ours, text = card_of(base="my base", is_on_hub=False)
    assert "base_model" not in ours
    assert ours["tags"] == ["lora", "qlora", "transformers"]
    assert "# LoRA adapter for my base\n" in text
    assert "\nvllm serve path/to/the/base --tokenizer path/to/this/folder --enable-lora" in text
    # who has the adapter alone reads what to do about it
    assert "The base model was read from a folder of that name: write the folder's place" in text


def test_the_card_names_the_adapters_files() -> None:
    _, text = card_of()
    assert "adapter_config.json, adapter_model.safetensors, tokenizer.json and this card" in text
    # what is not pushed is not spoken of
    assert not {"run.json has", "metrics.jsonl"} & set(text.split("`"))


def test_no_name_is_more_than_text_in_the_card() -> None:
    name = "a\n---\nlicense: mit\n# b<img src=x onerror=y>|[c](d)`e`*f*&\x1b"
    shown = r"a\\n---\\nlicense: mit\\n# b&lt;img src=x onerror=y&gt;\|\[c\](d)\`e\`\*f\*&amp;\\x1b"
    ours, text = card_of(base=name, is_on_hub=False, files=[name], data=f"/x/{name}", fields=name)
    plain, _ = card_of(is_on_hub=False)
    assert ours == plain
    for line in (
        f"# LoRA adapter for {shown}",
        f"{shown} and this card.",
        f"| `--data` | {shown} |",
        f"| `--fields` | {shown} |",
    ):
        assert f"\n{line}\n" in text
    for mark in ("<img", "\x1b", "\nlicense"):
        assert mark not in text


def test_the_figures_are_those_of_the_run() -> None:
    _, text = card_of()
    for line in (
        "| steps | 3 |",
        "| epochs | 1.50 |",
        "| tokens | 3,500, of them learned 1,200 |",
        "| training loss | 1.2500 (at first 2.5000, at best 1.0000) |",
        "| evaluation loss | 2.0000 (at first 3.0000, at best 2.0000) |",
        # e squared
        "| perplexity of the evaluation data | 7.389 |",
        "| tokens per second, the median | 300 |",
        "| memory | 3.00 GiB |",
    ):
        assert f"\n{line}\n" in text
    assert f"\n- torch {version('torch')}\n" in text


def test_a_step_without_a_loss_has_no_part_in_it() -> None:
    skipped: Any = ROWS[1] | {"loss": None, "grad_norm": None}
    _, text = card_of([skipped, *ROWS[2:3]])
    assert "| training loss | 1.0000 (at first 1.0000, at best 1.0000) |" in text
    assert "evaluation" not in text


def test_the_recipe_is_every_flag_that_made_the_adapter() -> None:
    _, text = card_of(lora_r=7, use_rslora=True, chat_template="a|b.jinja", output="/somewhere/out")
    for line in (
        "| `--lora-r` | 7 |",
        "| `--use-rslora` | True |",
        "| `--data` | chats.jsonl |",
        "| `--learning-rate` | 0.0002 |",
        "| `--chat-template` | a\\|b.jinja |",
        "| `--dtype` | auto |",
    ):
        assert f"\n{line}\n" in text
    for left_out in ("somewhere", "--output`", "--plan", "--device`", "--eval-data", "--resume"):
        assert left_out not in text


def pieces(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_card_shows_every_way_to_generate() -> None:
    _, text = card_of()
    shell = "".join(pieces(text, "bash")).splitlines()
    for line in (
        "python generate.py --adapter path/to/this/folder --chat",
        "vllm serve owner/base-1B --tokenizer path/to/this/folder --enable-lora --max-lora-rank 8 "
        "--lora-modules adapter=path/to/this/folder",
        "python merge.py --adapter path/to/this/folder --output merged --gguf q8_0",
        "ollama create my-model -f merged/Modelfile",
    ):
        assert line in shell
    assert len(pieces(text, "python")) == 3
    assert "would misread" not in text


def test_requests_of_the_card_are_json() -> None:
    for is_chat, door in ((True, "chat/completions"), (False, "completions")):
        _, text = card_of(usage=replace(USAGE, is_chat=is_chat))
        found = re.search(r"localhost:8000/v1/(\S+) .*\\\n  -d '(.*)'\n", text)
        assert found is not None
        assert found[1] == door
        request = json.loads(found[2])
        assert request["model"] == "adapter"
        assert ("messages" in request, "prompt" in request) == (is_chat, not is_chat)


@pytest.mark.parametrize("is_chat", [True, False])
@pytest.mark.parametrize(
    ("flags", "as_trained"),
    [
        ({}, True),
        ({"double_quant": False}, True),
        ({"block_size": 128}, False),
        ({"quant": "none"}, False),
    ],
)
def test_the_base_in_nf4_is_called_trained_where_it_is(
    flags: dict[str, Any], as_trained: bool, is_chat: bool
) -> None:
    _, text = card_of(usage=replace(USAGE, is_chat=is_chat), **flags)
    assert ("NF4 as in training:" in text) == as_trained
    assert f"bnb_4bit_use_double_quant={flags.get('double_quant', True)}," in text
    for piece in pieces(text, "python"):
        ast.parse(piece)
        assert ('"role": "user"' in piece) == is_chat


def test_programs_that_would_misread_the_adapter_are_named_first() -> None:
    _, text = card_of(usage=replace(USAGE, misreaders=("vLLM and SGLang",)))
    assert "## Use\n\n**vLLM and SGLang would misread this adapter: its projections have" in text
    assert "\nvllm serve merged\n" in text
    assert '{"model": "merged", "messages"' in text
