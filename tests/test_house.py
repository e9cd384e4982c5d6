"""The house: who may import whom, what no file may import, how long files are, nothing twice."""

import ast
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parent.parent

FLOORS = {
    "foreign": set(),
    "rows": set(),
    "nf4": {"foreign"},
    "kernels": {"nf4"},
    "lora": {"foreign", "hub", "kernels", "nf4"},
    "optim": {"kernels"},
    "run": {"foreign"},
    "hub": {"foreign"},
    "data": {"foreign", "hub", "run", "rows"},
    "llama": {"foreign", "kernels", "lora", "nf4", "rows"},
    "checkpoint": {"foreign", "hub", "kernels", "llama", "lora", "nf4"},
    "generation": {"foreign", "kernels", "llama", "lora", "nf4"},
    "step": {"foreign", "generation", "kernels", "llama", "lora", "nf4", "optim", "rows"},
    "prepare": {
        "checkpoint",
        "data",
        "foreign",
        "hub",
        "kernels",
        "llama",
        "lora",
        "nf4",
        "optim",
        "run",
        "step",
    },
    "training": {
        "data",
        "export",
        "foreign",
        "generation",
        "hub",
        "llama",
        "lora",
        "optim",
        "prepare",
        "run",
        "step",
    },
    "bundled": {"data", "llama", "rows"},
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
    "answering": {
        "checkpoint",
        "data",
        "foreign",
        "generation",
        "llama",
        "lora",
        "nf4",
        "prepare",
        "run",
        "step",
    },
    "generate": {"answering", "checkpoint", "foreign", "generation", "lora", "run"},
    "quantize": {"checkpoint", "foreign", "nf4", "run"},
    "export": {"checkpoint", "data", "foreign", "kernels", "llama"},
    "merging": {
        "checkpoint",
        "data",
        "export",
        "foreign",
        "llama",
        "lora",
        "nf4",
        "prepare",
        "rows",
        "run",
    },
    "merge": {"checkpoint", "export", "foreign", "llama", "lora", "merging", "run"},
}

# what is not ours, and the rooms or files that may know it
THEIRS = {
    "torch": set(FLOORS) - {"hub"},
    "triton": {"kernels/language.py"},
    "safetensors": {"checkpoint", "lora", "run", "bundled"},
    "tokenizers": {"data", "bundled"},
    "jinja2": {"data"},
    "yaml": {"foreign/yaml_head.py", "foreign/yaml_text.py"},
    "numpy": {"data", "export/gguf_file.py", "optim/unified_memory.py"},
    "pyarrow": {"data/reading/tables.py"},
    "huggingface_hub": {"hub"},
    "tqdm": {"run", "bundled"},
    "cuda": {"optim/unified_memory.py"},
    # optional extras, looked for before they are imported
    "matplotlib": {"run/loss_chart.py"},
    "gguf": {"export/gguf_file.py"},
}

# lines that a file of the product may have, and that half of the files have at most
MOST_LINES, MEDIAN_LINES = 400, 180
# so many equal lines one after the other stand in one place
RUN_LENGTH = 12


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


def num_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


@pytest.mark.parametrize("path", product_files(), ids=name_of)
def test_no_file_is_longer_than_it_may_be(path: Path) -> None:
    assert num_lines(path) <= MOST_LINES


def test_half_of_the_files_are_short() -> None:
    assert median(num_lines(path) for path in product_files()) <= MEDIAN_LINES


def compared_lines(path: Path) -> list[tuple[int, str]]:
    """List the lines of a file that are compared with others', each with its number.

    Without indentation. Left out are blank lines; imports, which say what a file uses; and heads of
    functions, from the first decorator to the line before the body: Triton has no other way to pass
    on a list of arguments, and a reference, a launcher and a public function have the same ones.
    """
    text = path.read_text()
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            left_out.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min((node.lineno, *(decorator.lineno for decorator in node.decorator_list)))
            left_out.update(range(first, node.body[0].lineno))
    lines = enumerate(text.splitlines(), 1)
    return [
        (number, line.strip()) for number, line in lines if line.strip() and number not in left_out
    ]


def test_no_run_of_lines_stands_twice() -> None:
    places: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for path in product_files():
        lines = compared_lines(path)
        for start in range(len(lines) - RUN_LENGTH + 1):
            run = tuple(line for _, line in lines[start : start + RUN_LENGTH])
            places[run].append(f"{name_of(path)}:{lines[start][0]}")
    twice = [found for found in places.values() if len(found) > 1]
    assert not twice, f"the same {RUN_LENGTH} lines stand at {' and at '.join(twice[0])}"
