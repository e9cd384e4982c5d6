"""recipes/: each runs on the bundled model, by its own settings where a CPU takes them."""

import json
import math
import re
from pathlib import Path

import pytest

import train
from prepare.job import BUNDLED
from run.config import read_given

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").iterdir())
NUM_RECORDS = 120


def write_data(folder: Path, recipe: str) -> Path:
    """Data of the recipe's kind: conversations, or a text of their answers."""
    lines = (BUNDLED / "data.jsonl").read_text().splitlines()[:NUM_RECORDS]
    if recipe != "continued-pretraining":
        (folder / "data.jsonl").write_text("\n".join(lines))
        return folder / "data.jsonl"
    (folder / "texts").mkdir()
    for index, line in enumerate(lines):
        answer = json.loads(line)["messages"][-1]["content"]
        (folder / "texts" / f"{index}.txt").write_text(answer)
    return folder / "texts"


def test_there_are_five_and_the_page_lists_them() -> None:
    assert len(RECIPES) == 5
    page = (ROOT / "docs" / "flags.md").read_text()
    assert all(f"(../recipes/{path.name})" in page for path in RECIPES)


def test_the_memory_that_a_recipe_speaks_of_is_in_the_table_of_what_fits() -> None:
    table = (ROOT / "README.md").read_text().partition("<!-- fits -->")[2]
    said = [size for path in RECIPES for size in re.findall(r"\d+\.\d GiB", path.read_text())]
    assert said
    assert all(f"| {size}," in table for size in said)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs(recipe: Path, tmp_path: Path) -> None:
    data, output = write_data(tmp_path, recipe.stem), tmp_path / "out"
    flags = {"model": BUNDLED / "model", "data": data, "output": output, "device": "cpu"}
    # as many tokens as the tiny model has positions for, at most
    flags |= {"max_length": 128, "max_steps": 1}
    train.main(["--config", str(recipe), *(f"--{name}={value}" for name, value in flags.items())])
    settings = json.loads((output / "run.json").read_text())
    own = read_given(["--config", str(recipe)])
    assert own.keys() >= {"model", "target_modules", "learning_rate", "batch_size"}
    assert {name: settings[name] for name in own if name not in flags} == {
        name: value for name, value in own.items() if name not in flags
    }
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 1
    assert math.isfinite(rows[-1]["loss"])
    assert (output / "adapter_model.safetensors").is_file()
