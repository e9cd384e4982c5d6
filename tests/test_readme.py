"""README.md says what is: its flags are train.py's, its map names every room."""

from dataclasses import fields
from pathlib import Path

from test_house import FLOORS

from run.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def flag_table() -> str:
    """The table of flags as README.md must have it."""
    lines = ["| flag | default | what it is |", "|---|---|---|"]
    for f in fields(TrainConfig):
        name, choices = f.name.replace("_", "-"), f.metadata["choices"]
        is_switch = f.default is None or isinstance(f.default, bool)
        flag = f"`--{name}`, `--no-{name}`" if is_switch else f"`--{name}`"
        what = f.metadata["help"] + (f" ({', '.join(choices)})" if choices else "")
        switches = {True: "yes", False: "no", None: ""}
        default = switches[f.default] if is_switch else f.default
        lines.append(f"| {flag} | {default} | {what} |")
    return "\n".join(lines)


def test_the_table_of_flags_is_train_pys() -> None:
    between = README.partition("<!-- flags -->\n")[2].partition("\n<!-- /flags -->")[0]
    assert between == flag_table(), f"put this between the markers:\n{flag_table()}"


def test_the_map_names_every_room() -> None:
    rooms = README.partition("## The map")[2].partition("## An evening")[0]
    for room in FLOORS:
        assert f"`{room}/`" in rooms or f"`{room}.py`" in rooms, room


def test_the_reading_list_names_files_that_are_there() -> None:
    listed = README.partition("## An evening")[2].split("`")[1::2]
    assert listed
    for name in listed:
        assert (ROOT / name).is_file(), name
