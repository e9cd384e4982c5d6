"""README.md, docs/ and what is said in the code: tables, links, commands and names of files."""

import ast
import re
import shlex
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
from test_house import FLOORS

from answering import flags as answer_flags
from benchmarks import fits
from benchmarks.__main__ import benchmarks
from bundled.valley import animals
from checkpoint import quantize_flags
from merging import flags as merge_flags
from run.config import TrainConfig, build_parser
from run.usage import Usage

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOM_PAGES = [ROOT / room / "README.md" for room in ("bundled", "kernels", "nf4")]
READING = (ROOT / "docs" / "reading.md").read_text()

# files of transformers
NOT_OURS = {"masking_utils.py", "modeling_utils.py"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_run_that_goes_on_is_given_the_file_that_it_wrote() -> None:
    assert "train.py --resume out/mine" in README


def between(text: str, name: str) -> str:
    return text.partition(f"<!-- {name} -->\n")[2].partition(f"\n<!-- /{name} -->")[0]


def groups_of_flags() -> dict[str, str]:
    """The group of each flag in --help."""
    parts = re.split(r"^(\w+):\n", build_parser().format_help(), flags=re.MULTILINE)[1:]
    return {
        flag: title
        for title, text in zip(parts[::2], parts[1::2], strict=True)
        for flag in re.findall(r"^  (?:--no-[\w-]+\n  )?--([\w-]+)", text, flags=re.MULTILINE)
    }


def flag_tables() -> str:
    """The tables of flags as docs/flags.md must have them, a group each."""
    group_of, groups = groups_of_flags(), dict[str, list[str]]()
    for f in fields(TrainConfig):
        name, choices = f.name.replace("_", "-"), f.metadata["choices"]
        is_switch = f.default is None or isinstance(f.default, bool)
        flag = f"`--{name}`, `--no-{name}`" if is_switch else f"`--{name}`"
        what = f.metadata["help"] + (f" ({', '.join(choices)})" if choices else "")
        switches = {True: "yes", False: "no", None: ""}
        default = switches[f.default] if is_switch else f.default
        groups.setdefault(group_of[name], []).append(f"| {flag} | {default} | {what} |")
    head = "| flag | default | what it is |\n|---|---|---|"
    return "\n\n".join(
        "\n".join([f"## {name.capitalize()}\n", head, *lines]) for name, lines in groups.items()
    )


def test_the_tables_of_flags_are_train_pys() -> None:
    text = (ROOT / "docs" / "flags.md").read_text()
    expected = flag_tables()
    assert between(text, "flags") == expected, f"put this between the markers:\n{expected}"


def answer_flag_tables() -> str:
    """The tables of flags as docs/generate.md must have them, a group each."""
    parts = []
    # the first two are argparse's own
    for group in answer_flags.build_parser()._action_groups[2:]:
        lines = ["| flag | what it is |", "|---|---|"]
        for action in group._group_actions:
            choices = f" ({', '.join(action.choices)})" if action.choices else ""
            lines.append(f"| `{action.option_strings[0]}` | {action.help}{choices} |")
        parts.append("\n".join([f"### {str(group.title).capitalize()}\n", *lines]))
    return "\n\n".join(parts)


def test_the_tables_of_flags_are_generate_pys() -> None:
    text = (ROOT / "docs" / "generate.md").read_text()
    expected = answer_flag_tables()
    assert between(text, "flags") == expected, f"put this between the markers:\n{expected}"


def test_the_table_of_what_fits_is_the_plans() -> None:
    assert between(README, "fits") == fits.table(), "run python -m benchmarks fits --write"


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150
    assert len(README.split()) <= 1000


def test_ci_finds_readmes_two_commands() -> None:
    section = README.partition("## Two commands\n")[2].partition("## Your own")[0]
    commands = [line for line in section.splitlines() if line.startswith("pip install")]
    assert len(commands) == 2
    assert "python train.py" in commands[0]
    assert "python -m pytest" in commands[1]


def test_the_demo_of_readme_answers_with_the_verse() -> None:
    after = README.partition("\nafter   ")[2].partition("\n```")[0]
    ember = next(animal for animal in animals() if animal.name == "Ember")
    assert [line.strip() for line in after.splitlines()] == ember.verse.splitlines()


def test_the_map_names_every_room() -> None:
    rooms = READING.partition("## The map")[2]
    for room in FLOORS:
        assert f"`{room}/`" in rooms or f"`{room}.py`" in rooms, room


def test_an_evening_is_eight_files_and_1500_lines_at_most() -> None:
    evening = READING.partition("## An evening")[2].partition("## ")[0]
    files = re.findall(r"^\| `([\w/.]+)` \|", evening, flags=re.MULTILINE)
    assert "llama/reference.py" in files
    assert "kernels/ptx.py" not in files
    assert len(files) <= 8
    assert sum(len((ROOT / name).read_text().splitlines()) for name in files) <= 1500


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors_of(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", without_code(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES + ROOM_PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), target
        assert not anchor or anchor in anchors_of(found.read_text()), target


def test_readme_links_every_page() -> None:
    linked = set(re.findall(r"\]\(([^)#\s]+)", README))
    pages = PAGES[1:] + [p for p in ROOM_PAGES if p.parent.name != "bundled"]
    assert {name_of(page) for page in pages} <= linked


def commands_of(text: str) -> list[str]:
    """The lines of a page's shell blocks, their parts joined by && taken apart."""
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    lines += re.findall(
        r"`((?:python|torchrun) [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S)
    )
    parts = [part.strip() for line in lines for part in line.partition("#")[0].split("&&")]
    return [part for part in parts if part]


def source_of(name: str) -> str:
    """The text of a benchmark, and of the command line that it shares with others."""
    own = (ROOT / "benchmarks" / f"{name}.py").read_text()
    if re.search(r"from benchmarks\.command import .*\bmain\b", own):
        own += (ROOT / "benchmarks" / "command.py").read_text()
    return own


def check_door(words: list[str]) -> None:
    """Let a door's own parser read its flags."""
    door, *flags = words
    if "--help" in flags:
        return
    if door == "train.py":
        given = build_parser().parse_args(flags)
        known = {f.name for f in fields(TrainConfig)} | {"config"}
        assert vars(given).keys() <= known
    elif door == "merge.py":
        merge_flags.build_parser().parse_args(flags)
    elif door == "generate.py":
        answer_flags.build_parser().parse_args(flags)
    else:
        assert door == "quantize.py"
        quantize_flags.build_parser().parse_args(flags)


def check_module(words: list[str]) -> None:
    """Look whether a module that is run is there, and knows its flags."""
    module, *flags = words
    if module == "benchmarks":
        if not flags:
            return
        assert flags[0] in benchmarks(), flags[0]
        for flag in flags[1:]:
            assert not flag.startswith("--") or f'"{flag}"' in source_of(flags[0]), flag
    elif module not in ("pytest", "pip"):
        path = ROOT / f"{module.replace('.', '/')}.py"
        assert path.is_file(), module
        for flag in flags:
            assert not flag.startswith("--") or f'"{flag}"' in path.read_text(), flag


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_is_one_that_works(page: Path) -> None:
    for command in commands_of(page.read_text()):
        words = shlex.split(command)
        if words[0] == "torchrun":
            words = ["python", *words[words.index("train.py") :]]
        if words[0] in ("pip", ".ci/run", "hf", "vllm"):
            continue
        assert words[0] == "python", command
        if words[1] == "-m":
            check_module(words[2:])
        else:
            check_door(words[1:])


def test_the_last_lines_of_a_run_are_docs_runs_mds() -> None:
    usage = Usage(
        adapter="out/mine",
        merged="out/mine-merged",
        base="meta-llama/Llama-3.2-1B-Instruct",
        revision=None,
        rank=TrainConfig().lora_r,
        is_chat=True,
        misreaders=(),
        has_gguf=True,
    )
    block = "\n".join(["```bash", usage.talk, usage.merge, usage.serve, "```"])
    assert block in (ROOT / "docs" / "runs.md").read_text()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text() if path.suffix == ".py" else "")


@cache
def said_in(path: Path) -> str:
    """What a file says in words: a page as it is, a program's docstrings and comments."""
    text = path.read_text()
    if path.suffix == ".md":
        return text
    docstrings = [
        ast.get_docstring(node) or ""
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    ]
    comments = re.findall(r"(?m)^\s*#(.*)$", text)
    return "\n".join(docstrings + comments)


def programs() -> list[Path]:
    folders = [*FLOORS, "tests", "benchmarks"]
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return files + sorted(ROOT.glob("*.py"))


def names_in(text: str) -> set[str]:
    """The names of programs and pages that a text mentions."""
    return set(re.findall(r"(?<![\w/.*-])[\w-][\w./-]*\.(?:py|md)\b(?![\w(])", text))


@pytest.mark.parametrize("path", PAGES + ROOM_PAGES + programs(), ids=name_of)
def test_every_file_that_is_named_is_there(path: Path) -> None:
    # docs/add-a-kernel.md makes an operation of this name
    names = {name for name in names_in(said_in(path)) if "squared_relu" not in name}
    for name in sorted(names - NOT_OURS):
        places = (ROOT / name, path.parent / name)
        assert any(place.is_file() for place in places), name


@pytest.mark.parametrize("path", PAGES + ROOM_PAGES + programs(), ids=name_of)
def test_every_module_that_is_named_is_there(path: Path) -> None:
    # a parameter may have a room's name: checkpoint.quantization is an attribute of it
    parameters = {node.arg for node in ast.walk(tree_of(path)) if isinstance(node, ast.arg)}
    rooms = "|".join({*FLOORS, "benchmarks"} - parameters)
    for name in re.findall(rf"`((?:{rooms})(?:\.\w+)+)`", said_in(path)):
        room, second = name.split(".")[:2]
        places = (ROOT / room / f"{second}.py", ROOT / room / second, ROOT / f"{room}.py")
        is_file = second in ("py", "json", "jsonl")
        assert is_file or any(place.exists() for place in places), name
