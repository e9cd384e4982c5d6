"""answering/choice.py: each setting from its flag, else from generation_config.json."""

import json
from pathlib import Path
from typing import Any

import pytest

from answering.choice import choose_sampling
from answering.flags import parse
from generation.sampling import Sampling

STORED = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}


def choose(folder: Path, stored: dict[str, Any] | None, *flags: str) -> tuple[Sampling, str]:
    if stored is not None:
        (folder / "generation_config.json").write_text(json.dumps(stored))
    given = parse(["--model", "m", "--prompt", "a", "--seed", "1", *flags])
    return choose_sampling(given, folder)


@pytest.mark.parametrize(
    ("stored", "flags", "sampling", "said"),
    [
        (None, (), Sampling(seed=1), "the most probable token (default)"),
        (
            STORED,
            (),
            Sampling(0.6, 20, 0.9, seed=1),
            "temperature 0.6 (generation_config.json), top k 20 (generation_config.json), "
            "top p 0.9 (generation_config.json), seed 1",
        ),
        (
            STORED,
            ("--temperature", "0.2", "--top-k", "0"),
            Sampling(0.2, None, 0.9, seed=1),
            "temperature 0.2 (--temperature), top p 0.9 (generation_config.json), seed 1",
        ),
        (STORED, ("--temperature", "0"), Sampling(0, 20, 0.9, seed=1), "token (--temperature)"),
        # transformers draws at temperature 1 where do_sample stands alone
        ({"do_sample": True}, (), Sampling(1.0, seed=1), "temperature 1"),
        ({"do_sample": True, "top_k": 0}, (), Sampling(1.0, seed=1), "temperature 1"),
        # what is for draws only, in a file that asks for none
        ({"temperature": 0.6, "top_p": 0.9}, (), Sampling(seed=1), "the most probable token"),
        (
            {"do_sample": False, "repetition_penalty": 1.1},
            (),
            Sampling(repetition_penalty=1.1, seed=1),
            "the most probable token (default), repetition penalty 1.1 (generation_config.json)",
        ),
    ],
)
def test_a_setting_is_its_flags_or_the_files(
    tmp_path: Path, stored: Any, flags: tuple[str, ...], sampling: Sampling, said: str
) -> None:
    chosen, described = choose(tmp_path, stored, *flags)
    assert chosen == sampling
    assert said in described


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"do_sample": 1}, "do_sample must be true or false: got 1"),
        ({"do_sample": True, "temperature": -1}, "temperature must be a positive number: got -1"),
        ({"do_sample": True, "top_p": 2}, "top_p must be at most 1: got 2"),
        ({"do_sample": True, "top_k": "x"}, "top_k must be a positive integer: got 'x'"),
        ([], "must hold a JSON object"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, stored: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(tmp_path, stored)


def test_draws_without_a_temperature_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--top-k must be given with a --temperature above 0"):
        choose(tmp_path, None, "--top-k", "4")
