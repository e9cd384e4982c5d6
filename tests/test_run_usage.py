"""run/usage.py: commands that a shell takes as they are meant, and who would misread an adapter."""

import shlex
from typing import Any

import pytest

from run.usage import Usage


def usage(**changes: Any) -> Usage:
    given: dict[str, Any] = {
        "adapter": "out/my run",
        "merged": "out/my run-merged",
        "base": "owner/base-1B",
        "revision": None,
        "rank": 16,
        "is_chat": True,
        "misreaders": (),
        "has_gguf": True,
    }
    return Usage(**given | changes)


def test_each_command_is_quoted_for_the_shell() -> None:
    hostile = usage(adapter="a; rm -rf 'b'", merged="$HOME", base="`c`", is_chat=False)
    assert shlex.split(hostile.talk)[2:4] == ["--adapter", "a; rm -rf 'b'"]
    assert shlex.split(hostile.answer)[-2:] == ["--prompt", "Once upon a time"]
    assert "$HOME" in shlex.split(hostile.merge)
    assert shlex.split(hostile.serve)[2] == "`c`"
    assert shlex.split(hostile.serve)[-1] == "adapter=a; rm -rf 'b'"
    for command in (hostile.talk, hostile.answer, hostile.merge, hostile.serve):
        assert shlex.join(shlex.split(command)) == command


def test_a_run_ends_with_the_commands_that_go_on() -> None:
    talk, merge, serve = usage(adapter="out/mine", merged="out/mine-merged").last_lines()[1:]
    assert talk == "talk    python generate.py --adapter out/mine --chat"
    assert merge == (
        "merge   python merge.py --adapter out/mine --output out/mine-merged --gguf q8_0"
    )
    assert serve == (
        "serve   vllm serve owner/base-1B --tokenizer out/mine --enable-lora --max-lora-rank 16 "
        "--lora-modules adapter=out/mine"
    )


def test_a_family_that_llama_cpp_has_not_is_merged_without_a_file_for_it() -> None:
    assert "--gguf" not in usage(has_gguf=False).merge


def test_without_a_chat_template_a_text_is_continued() -> None:
    _, talk, *_ = usage(is_chat=False).last_lines()
    assert talk.endswith("--adapter 'out/my run' --prompt 'Once upon a time'")


def test_a_revision_of_the_base_is_served() -> None:
    assert shlex.split(usage(revision="v2").serve)[:5] == (
        ["vllm", "serve", "owner/base-1B", "--revision", "v2"]
    )


@pytest.mark.parametrize(("rank", "told"), [(1, 8), (8, 8), (9, 16), (100, 128), (320, 320)])
def test_vllm_is_told_a_rank_that_it_takes(rank: int, told: int) -> None:
    assert f"--max-lora-rank {told} " in usage(rank=rank).serve


@pytest.mark.parametrize(
    ("misreaders", "is_merged"),
    [
        (("llama.cpp and Ollama",), False),
        (("vLLM and SGLang",), True),
        (("llama.cpp and Ollama", "vLLM and SGLang"), True),
    ],
)
def test_who_would_misread_an_adapter_is_named_and_gets_the_merged_model(
    misreaders: tuple[str, ...], is_merged: bool
) -> None:
    given = usage(misreaders=misreaders)
    warning, *_, serve = given.last_lines()
    assert warning.startswith(f"{', '.join(misreaders)} would misread this adapter: its")
    assert (serve == "serve   vllm serve 'out/my run-merged'") == is_merged


def test_of_an_adapter_that_all_read_nothing_is_said() -> None:
    assert usage().warning == ""
    assert usage().last_lines()[0] == ""
