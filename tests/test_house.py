"""The house: who may import whom, and what no file may import."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FLOORS = {
    "foreign": set(),
    "nf4": {"foreign"},
    "kernels": {"nf4"},
    "lora": {"foreign", "hub", "kernels", "nf4"},
    "optim": {"kernels"},
    "run": {"foreign"},
    "hub": {"foreign"},
    "data": {"foreign", "hub", "run"},
    "llama": {"foreign", "kernels", "lora", "nf4"},
    "checkpoint": {"foreign", "hub", "kernels", "llama", "lora", "nf4"},
    "step": {"kernels", "llama", "lora", "nf4"},
    "prepare": {
        "checkpoint",
        "data",
        "foreign",
        "hub",
        "llama",
        "lora",
        "nf4",
        "optim",
        "run",
        "step",
    },
    "training": {
        "data",
        "foreign",
        "hub",
        "llama",
        "lora",
        "optim",
        "prepare",
        "run",
        "step",
    },
    "bundled": {"data", "llama", "lora"},
    "train": {
        "checkpoint",
        "foreign",
        "kernels",
        "llama",
        "lora",
        "optim",
        "prepare",
        "run",
        "step",
        "training",
    },
    "quantize": {"checkpoint", "foreign", "nf4", "run"},
    "merge": {"checkpoint", "data", "foreign", "llama", "lora", "nf4", "prepare", "run"},
}

# what is not ours, and the rooms or files that may know it
THEIRS = {
    "torch": set(FLOORS) - {"hub"},
    "triton": {"kernels"},
    "safetensors": {"checkpoint", "lora", "run", "bundled"},
    "tokenizers": {"data", "bundled"},
    "jinja2": {"data"},
    "numpy": {"data", "optim/unified_memory.py"},
    "pyarrow": {"data/reading/tables.py"},
    "huggingface_hub": {"hub"},
    "tqdm": {"run", "prepare", "train", "quantize", "merge", "bundled"},
    "cuda": {"optim/unified_memory.py"},
    # an optional extra, looked for before it is imported
    "matplotlib": {"run/loss_chart.py"},
}


def product_files() -> list[Path]:
    files = [path for room in FLOORS for path in sorted((ROOT / room).rglob("*.py"))]
    return files + [ROOT / f"{door}.py" for door in FLOORS if (ROOT / f"{door}.py").is_file()]


def imports_of(path: Path) -> list[tuple[int, str]]:
    """Every import of a file: its line and the first segment of what it names."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name.partition(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found.append((node.lineno, (node.module or "").partition(".")[0]))
    return found


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", product_files(), ids=name_of)
def test_no_import_runs_up(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for line, name in imports_of(path):
        if name in FLOORS:
            assert name == room or name in FLOORS[room], f"{name_of(path)}:{line} imports {name}"


@pytest.mark.parametrize("path", product_files(), ids=name_of)
def test_every_library_stays_in_its_rooms(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for line, name in imports_of(path):
        if name in FLOORS or name in sys.stdlib_module_names:
            continue
        where = f"{name_of(path)}:{line} imports {name}"
        assert name in THEIRS, where
        assert room in THEIRS[name] or name_of(path) in THEIRS[name], where


@pytest.mark.parametrize("path", product_files(), ids=name_of)
def test_nothing_is_pickled(path: Path) -> None:
    text = path.read_text()
    for word in ("import pickle", "torch.load(", "torch.save(", "eval(compile"):
        assert word not in text, f"{name_of(path)} has {word}"


def test_kernels_imports_nothing_when_another_library_probes_for_it() -> None:
    tree = ast.parse((ROOT / "kernels" / "__init__.py").read_text())
    assert len(tree.body) == 1
    assert isinstance(tree.body[0], ast.Expr)


def test_every_room_is_in_the_table() -> None:
    rooms = {p.parent.name for p in ROOT.glob("*/__init__.py")} - {"benchmarks"}
    doors = {p.stem for p in ROOT.glob("*.py")}
    assert rooms | doors == set(FLOORS)
