"""All settings of a run: one frozen dataclass, read from the command line or from a file.

    python train.py --learning-rate 1e-4    ->    TrainConfig(learning_rate=1e-4)

The resolved settings are written to OUT/run.json, and under "asked" those that were left to the
machine. `--config OUT/run.json` runs what was asked: a trial on a laptop uses the GPU elsewhere.
`--resume OUT` goes on with what it became.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from foreign.command_line import Parser
from foreign.reading import Reading
from foreign.terminal import printable
from foreign.yaml_text import Setting
from run.flags import (
    AdapterFlags,
    DataFlags,
    MemoryFlags,
    ModelFlags,
    OutputFlags,
    TrainingFlags,
    flag_name,
)
from run.known_names import ALSO, ELSEWHERE
from run.settings_file import as_arguments, read_settings

CONFIG_FILE = "run.json"
# the key of a run.json under which the fields are as they were asked for
ASKED = "asked"
# of version 0.1; transformers takes a file of this name for a model's
OLD_CONFIG_FILE = "config.json"

# flags that a resumed run may change: they decide what is written and where, not what is computed
FREE_ON_RESUME = frozenset(
    {
        "output",
        "resume",
        "eval_steps",
        "save_steps",
        "save_total_limit",
        "sample_steps",
        "sample_prompt",
        "report_to",
        "logging_steps",
        "max_bad_steps",
        "optimizer_residency",
        "activations",
        "max_memory",
        "plan",
        "gpu",
        "push_to_hub",
        "allow_truncation",
        "inspect",
        "dataset_num_proc",
    }
)

# flags that may name a place on the disk; a shell leaves ~ alone in --model=~/base
_PLACES = ("model", "data", "output", "eval_data", "chat_template", "init_adapter")

# in the order of --help, by title
GROUPS = {
    "model": ModelFlags,
    "data": DataFlags,
    "adapter": AdapterFlags,
    "training": TrainingFlags,
    "memory": MemoryFlags,
    "output": OutputFlags,
}


# a dataclass has the fields of its last base first
@dataclass(frozen=True)
class TrainConfig(OutputFlags, MemoryFlags, TrainingFlags, AdapterFlags, DataFlags, ModelFlags):
    """All flags of train.py, in the order of --help.

    Raises:
        ValueError: a value out of range.
    """


# of values
_KINDS = {int: "a whole number", float: "a number"}


def _default(f: Field) -> Any:
    assert f.default is not MISSING
    return f.default


def build_parser(file: Path | None = None) -> argparse.ArgumentParser:
    """The command line of train.py: one flag per field of TrainConfig, and --config.

    Args:
        file: the file of --config, where the settings are from that, not from a command line.
    """
    parser = Parser(
        prog="train.py",
        # argparse's own is a page
        usage="python train.py [--model MODEL --data DATA] [--output FOLDER] [more flags]",
        description="Fine-tune a Llama checkpoint with QLoRA. "
        "Without --model and --data: a bundled tiny model on bundled data.",
        also=ALSO,
        elsewhere=ELSEWHERE,
        file=file,
    )
    if not file:
        parser.add_argument(
            "--config",
            help="settings in YAML or JSON, such as a file of recipes/ or the run.json of an "
            "earlier run; flags override them",
        )
    for title, flags in GROUPS.items():
        group = parser.add_argument_group(title)
        for f in fields(flags):
            _add_flag(group, f)
    return parser


def _add_flag(group: Any, f: Field) -> None:
    """Add the flag of a field of TrainConfig to its group in --help."""
    default, choices, bare = _default(f), f.metadata["choices"], f.metadata["bare"]
    help = f.metadata["help"] + ("" if default in ("", None) else f" (default: {default})")
    # absent means: not given on the command line
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": help}
    if isinstance(default, bool) or default is None:
        options["action"] = argparse.BooleanOptionalAction
    else:
        also = f.metadata["also"]

        def read(text: str) -> Any:
            try:
                return type(default)(also.get(text, text))
            except ValueError:
                message = f"must be {_KINDS[type(default)]}: got {text!r} ({f.metadata['help']})"
                raise argparse.ArgumentTypeError(message) from None

        options |= {"type": read, "choices": choices}
        options["metavar"] = None if choices else type(default).__name__.upper()
        if f.metadata["is_list"]:
            options |= {"action": "extend" if f.metadata["adds_up"] else "store", "nargs": "+"}
    if bare is not None:
        options |= {"nargs": "?", "const": bare}
        without = {"dest": f.name, "action": "store_const", "const": default}
        group.add_argument(flag_name(f"no_{f.name}"), default=argparse.SUPPRESS, **without)
    group.add_argument(flag_name(f.name), **options)


def _values(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> dict[str, Any]:
    """Read the fields that arguments give; the texts of a list are joined by commas."""
    given = vars(parser.parse_args(arguments))
    return {n: ",".join(value) if isinstance(value, list) else value for n, value in given.items()}


def read_given(arguments: Sequence[str]) -> dict[str, Any]:
    """Read the fields that are given: on the command line, over the file of --config.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is neither YAML nor JSON, or a setting is not what a flag could be.
    """
    given = _values(build_parser(), arguments)
    file = given.pop("config")
    given = _instead(_expand_home(given))
    if given.get("resume", "") not in ("", "auto"):
        return _read_run(Path(given["resume"]).expanduser(), file, given)
    if not file:
        return given
    path = Path(file).expanduser()
    return read_fields(path) | read_asked(path) | given


def answer_mistakes(arguments: Sequence[str]) -> None:
    """End the process with a message if read_given() refuses the arguments."""
    try:
        read_given(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {printable(error)}")


def _read_run(folder: Path, file: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """Read the settings of the run that --resume names the folder of."""
    if file or "output" in given:
        other = "--config" if file else "--output"
        raise ValueError(f"--resume {folder} says which run it is: leave out {other}")
    path = find_config(folder)
    if path is None:
        # a folder in it, such as a checkpoint's
        run = folder.absolute().parent
        advice = f"; it is in that of a run: --resume {run}" if find_config(run) else ""
        raise FileNotFoundError(
            f"--resume must name the folder of a run: {folder} has no {CONFIG_FILE}{advice}"
        )
    return read_fields(path) | given | {"output": str(folder), "resume": "auto"}


def make_config(given: dict[str, Any], without_model: dict[str, Any]) -> TrainConfig:
    """Complete the fields that are given by the defaults.

    Args:
        without_model: the fields of a run that names neither a model nor data.

    Raises:
        ValueError: a value out of range, or a model without data or the reverse.
    """
    if not given.get("model") and not given.get("data"):
        given = without_model | given
    config = TrainConfig(**given)
    if config.plan and config.model and not config.data:
        _check_without_data(config)
    elif not config.model or not config.data:
        missing, there = ("--data", "--model") if config.model else ("--model", "--data")
        raise ValueError(
            f"--model and --data must be given together: got {there} without {missing}; "
            "leave out both to train the bundled model"
        )
    if config.resume and not config.output:
        raise ValueError(
            "--resume must be given with --output, the folder of the run to go on with"
        )
    return config


def _check_without_data(config: TrainConfig) -> None:
    """Refuse flags of a plan that nothing can be said of without data and a tokenizer."""
    for name in ("eval_data", "eval_fraction", "sample_prompt", "inspect"):
        if getattr(config, name):
            raise ValueError(f"{flag_name(name)} must be given with --data: got none")


def find_config(folder: Path) -> Path | None:
    """Find the settings of the run that a folder is of; None where it is no run's.

    Folders that version 0.1 began have them in config.json. Another program's config.json, such as
    a model's, has none of LoRA.
    """
    path, old = folder / CONFIG_FILE, folder / OLD_CONFIG_FILE
    if path.is_file():
        return path
    is_ours = old.is_file() and '"lora_r"' in old.read_text(encoding="utf-8", errors="replace")
    return old if is_ours else None


def _instead(values: dict[str, Any]) -> dict[str, Any]:
    """Let --warmup-steps stand instead of --warmup-ratio, and the reverse, where one is given."""
    neither = {"warmup_steps": 0, "warmup_ratio": 0.0}
    return neither | values if values.keys() & neither.keys() else values


def _expand_home(values: dict[str, Any]) -> dict[str, Any]:
    """Write out the ~ of places on the disk."""
    return values | {name: _at_home(values[name]) for name in _PLACES if name in values}


def _at_home(places: str) -> str:
    return ",".join(map(os.path.expanduser, places.split(",")))


def read_fields(path: Path) -> dict[str, Any]:
    """Read the fields of a file of settings, such as a run.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is neither YAML nor JSON, or a setting is not what a flag could be.
    """
    return _read(path)[0]


def read_asked(path: Path) -> dict[str, Any]:
    """Read the fields of a run.json that were left to the machine, as they were asked for; raises
    the same errors as read_fields()."""
    return _read(path)[1]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"--config must be a file of settings, such as the {CONFIG_FILE} of a run: there is no "
            f"file {path}"
        )
    with Reading(path):
        settings = read_settings(path)
        asked = settings.get(ASKED)
        if not isinstance(asked, dict) or not asked:
            return _parse(settings, path), {}
        del settings[ASKED]
        # a switch that was left open has no value
        left_open = {name: None for name, value in asked.items() if value is None}
        return _parse(settings, path), left_open | _parse(asked, path)


def _parse(settings: Mapping[str, Setting], path: Path) -> dict[str, Any]:
    """Read settings of a file as the command line would be read that says the same."""
    lists = {flag_name(f.name) for f in fields(TrainConfig) if f.metadata["is_list"]}
    lists |= {name for name, ours in ALSO.items() if ours in lists}
    known = {flag_name(f.name) for f in fields(TrainConfig)} | (ALSO.keys() - ELSEWHERE.keys())
    arguments = as_arguments(settings, path, lists, known)
    return _instead(_expand_home(_values(build_parser(path), arguments)))


def to_json(config: TrainConfig, asked: Mapping[str, Any] | None = None) -> str:
    """Write a run.json.

    Args:
        asked: the fields that were left to the machine, as they were asked for.
    """
    return json.dumps(asdict(config) | ({ASKED: asked} if asked else {}), indent=2) + "\n"


def differences(config: TrainConfig, path: Path) -> list[str]:
    """The fields whose values make a config another run than a run.json's, a line for each."""
    # a flag that is younger than the file had no other value
    earlier = {f.name: _default(f) for f in fields(TrainConfig)} | read_fields(path)
    # where the run may end
    decides = {"eval_steps"} if config.early_stopping_patience else set()
    return [
        f"{flag_name(name)} was {earlier[name]!r}, now {value!r}"
        for name, value in asdict(config).items()
        if name not in FREE_ON_RESUME - decides and earlier[name] != value
    ]
