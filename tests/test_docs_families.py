"""docs/families.md: its tables are what the families' fields, the tests and the planner say."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import ROOT
from support.families_page import (
    OTHERWISE,
    SAID,
    UNSAID,
    line_of_plan,
    list_of_proofs,
    table_of_differences,
    table_of_proofs,
)
from support.real_sizes import REAL

from foreign.json_text import read_object
from llama.families import FAMILIES
from llama.family import Family

PAGE = (ROOT / "docs" / "families.md").read_text()


def between(name: str) -> str:
    return PAGE.partition(f"<!-- {name} -->\n")[2].partition(f"\n<!-- /{name} -->")[0]


def test_every_field_of_a_family_is_said_or_left_out_on_purpose() -> None:
    assert {field.name for field in fields(Family)} == SAID.keys() | OTHERWISE | UNSAID


def test_what_tells_families_from_llama_is_what_their_fields_say() -> None:
    expected = table_of_differences()
    assert between("differences") == expected, f"put this between the markers:\n{expected}"


def test_what_is_proven_is_what_the_tests_are_run_for() -> None:
    expected = f"{table_of_proofs()}\n\n{list_of_proofs()}"
    assert between("proofs") == expected, f"put this between the markers:\n{expected}"


def test_sizes_of_all_families_are_planned() -> None:
    models = re.findall(r"^\| (?!model|---)([^|]+) \|", between("fits"), re.MULTILINE)
    assert models == list(REAL)
    named = {fields["architectures"][0] for fields in REAL.values()}
    assert named == FAMILIES.keys()


@pytest.mark.parametrize("model", REAL)
def test_a_size_fits_where_its_plan_says(model: str, tmp_path: Path) -> None:
    expected = line_of_plan(model, tmp_path)
    assert expected in between("fits").splitlines(), f"put this line there:\n{expected}"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Llama-3.2-1B", "Llama-3.2-1B"),
        ("Llama-3.1-8B", "Llama-3.1-8B"),
        ("Llama-3.1-70B", "Llama-3.1-70B"),
        ("Mistral-7B", "Mistral-7B-v0.3"),
        ("Qwen2.5-7B", "Qwen2.5-7B"),
        ("Qwen3-8B", "Qwen3-8B"),
        ("Gemma-2-9B", "gemma-2-9b"),
    ],
)
def test_sizes_are_those_of_the_published_file(assets: Path, model: str, name: str) -> None:
    published = read_object(assets / "configs" / name / "config.json")
    for key, value in REAL[model].items():
        if key.startswith(("hidden", "inter", "num", "vocab")):
            assert published[key] == value, key
