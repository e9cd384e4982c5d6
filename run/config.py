"""Everything a run depends on: one frozen dataclass, its flags on the command line, its file.

    python train.py --learning-rate 1e-4    ->    TrainConfig(learning_rate=1e-4)

Names are those of transformers' TrainingArguments and PEFT's LoraConfig where one exists. The
resolved config is written to OUT/config.json; `--config OUT/config.json` runs it again.
"""

import argparse
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from foreign.json_text import read_object
from foreign.reading import Reading

CONFIG_FILE = "config.json"

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
        "push_to_hub",
        "allow_truncation",
        "inspect",
        "dataset_num_proc",
    }
)


# flags that may name a place on the disk; a shell leaves ~ alone in --model=~/base
_PLACES = ("model", "data", "output", "eval_data", "chat_template", "init_adapter")
_UNITS = {"GiB": 1 << 30, "MiB": 1 << 20, "GB": 10**9, "MB": 10**6}
_SIZE = re.compile(rf"(\d+(?:\.\d+)?) ?({'|'.join(_UNITS)})")


def _flag(
    default: Any,
    group: str,
    help: str,
    choices: tuple[str, ...] | None = None,
    bare: str | None = None,
) -> Any:
    """Describe a field.

    Args:
        bare: what the flag means without a value; then there is a --no-flag, too.
    """
    metadata = {"group": group, "help": help, "choices": choices, "bare": bare}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """The flags of train.py, resolved and checked.

    Raises:
        ValueError: a value out of range.
    """

    model: str = _flag("", "data", "checkpoint folder or hub id, @revision if wanted")
    data: str = _flag(
        "",
        "data",
        "what to learn from: a .jsonl, .json, .csv, .txt (each also .gz) or .parquet file, a "
        "folder of them, or a hub id",
    )
    output: str = _flag("", "data", "folder for the results; by default the next free out/run-N")
    eval_data: str = _flag("", "data", "what to evaluate on, as --data")
    eval_fraction: float = _flag(
        0.0, "data", "share of --data to evaluate on instead, chosen by the samples' content"
    )
    data_format: str = _flag(
        "auto",
        "data",
        "how records are read",
        ("auto", "messages", "sharegpt", "alpaca", "prompt-completion", "text", "tokenized"),
    )
    text_field: str = _flag("text", "data", "field of a text record")
    ignore_fields: str = _flag(
        "", "data", "fields of records and messages that no answer depends on, with commas"
    )
    max_length: int = _flag(
        0, "data", "tokens of the longest sample; 0: the model's positions, at most 2048"
    )
    group_by_length: bool = _flag(
        False, "data", "micro-batches of samples of like lengths, which need less padding"
    )
    packing: bool | None = _flag(
        None,
        "data",
        "several samples in each row of --max-length tokens, of which none sees another; by "
        "default on a GPU of compute capability 8.0 or later",
    )
    train_on: str = _flag("completions", "data", "which tokens have a loss", ("completions", "all"))
    chat_template: str = _flag(
        "", "data", "bundled (chatml), a .jinja file, or one of the checkpoint's by name"
    )
    shuffle: bool = _flag(True, "data", "a new order of samples each epoch")
    skip_bad_lines: bool = _flag(
        False, "data", "leave out records that are not what they must be, and count them"
    )
    allow_truncation: bool = _flag(
        False, "data", "go on where more than half of the records are cut to --max-length"
    )
    inspect: int = _flag(0, "data", "show so many samples with what is learned of them, and stop")
    dataset_num_proc: int = _flag(
        0, "data", "processes that tokenize; 0: as many as the data is worth"
    )

    quant: str = _flag(
        "nf4", "quantization", "number format of the frozen weights", ("nf4", "none")
    )
    block_size: int = _flag(64, "quantization", "weights that share a scale: 32 to 4096")
    double_quant: bool = _flag(True, "quantization", "quantize the scales to 8 bits")

    lora_r: int = _flag(16, "adapter", "rank of the update")
    lora_alpha: float = _flag(32.0, "adapter", "the update is scaled by alpha / r")
    lora_dropout: float = _flag(0.0, "adapter", "dropout before lora_A")
    target_modules: str = _flag(
        "all-linear", "adapter", "projections to adapt: all-linear or names with commas"
    )
    use_rslora: bool = _flag(False, "adapter", "scale by alpha / sqrt(r)")
    init_adapter: str = _flag("", "adapter", "adapter folder or hub id to start from")

    optim: str = _flag(
        "paged_adamw_32bit",
        "optimizer",
        "paged: moments in CUDA unified memory; 8bit: quantized in blocks",
        ("paged_adamw_32bit", "paged_adamw_8bit", "adamw"),
    )
    optimizer_residency: str = _flag(
        "auto",
        "optimizer",
        "where paged moments are between steps; auto: on the host where less than twice their size "
        "is free on the device at first",
        ("auto", "device", "host"),
    )
    learning_rate: float = _flag(2e-4, "optimizer", "the highest rate of the schedule")
    loraplus_lr_ratio: float = _flag(
        1.0, "optimizer", "LoRA+: the rate of lora_B over that of lora_A"
    )
    lr_scheduler: str = _flag(
        "cosine", "optimizer", "decay after the warm-up", ("cosine", "linear", "constant")
    )
    warmup_ratio: float = _flag(0.03, "optimizer", "share of the steps with a rising rate")
    weight_decay: float = _flag(0.0, "optimizer", "decoupled decay of the adapter")
    max_grad_norm: float = _flag(1.0, "optimizer", "clip the gradients' norm; 0: do not")

    neftune_noise_alpha: float = _flag(
        0.0, "run", "NEFTune: noise of alpha / sqrt(tokens x hidden size) on embeddings; 0: none"
    )
    batch_size: int = _flag(4, "run", "samples of a micro-batch")
    gradient_accumulation_steps: int = _flag(4, "run", "micro-batches of a step, of each rank")
    epochs: float = _flag(1.0, "run", "passes over the data")
    max_steps: int = _flag(-1, "run", "steps, instead of epochs; 0: evaluate only")
    early_stopping_patience: int = _flag(
        0,
        "run",
        "end after so many evaluations in a row without a lower eval_loss; what is saved is the "
        "adapter with the lowest; 0: train to the last step, save the last",
    )
    eval_steps: int = _flag(0, "run", "evaluate every so many steps; 0: at the start and the end")
    save_steps: int = _flag(100, "run", "a checkpoint every so many steps; 0: none")
    save_total_limit: int = _flag(
        0, "run", "checkpoints to keep; the oldest goes when the new one is whole; 0: all"
    )
    logging_steps: int = _flag(1, "run", "a row of metrics every so many steps")
    max_bad_steps: int = _flag(
        30,
        "run",
        "steps in a row with a loss or gradients that are not finite, each skipped, before the run "
        "stops; float16 has some at first, until its loss scale fits",
    )
    resume: str = _flag(
        "",
        "run",
        "auto, or nothing after it: go on from the last whole checkpoint in --output, from the "
        "first step if there is none",
        bare="auto",
    )
    seed: int = _flag(42, "run", "decides the adapter's start, the order and the dropout")
    push_to_hub: str = _flag("", "run", "hub id to send the adapter to, private if it is new")
    report_to: str = _flag(
        "", "run", "trackers, with commas: tensorboard, wandb, trackio; each an optional extra"
    )
    sample_steps: int = _flag(
        0, "run", "answer --sample-prompt every so many steps; 0: at the start and the end"
    )
    sample_prompt: str = _flag("", "run", "a prompt to answer before and after training")

    device: str = _flag("auto", "machine", "auto: a GPU if there is one", ("auto", "cpu", "cuda"))
    dtype: str = _flag(
        "auto",
        "machine",
        "of the computation; auto: bfloat16 on a GPU that has it, float16 on another, "
        "float32 on a CPU",
        ("auto", "bfloat16", "float16", "float32"),
    )
    activations: str = _flag(
        "auto",
        "machine",
        "of each layer: keep them for the backward pass, recompute them from the layer's input, or "
        "offload that input to the host; auto: the fastest mix that fits",
        ("auto", "keep", "recompute", "offload"),
    )
    max_memory: str = _flag(
        "", "machine", "of the GPU, such as 24GiB; by default what is free on it"
    )
    plan: bool = _flag(False, "machine", "say what the run will take of memory and time, and stop")
    deterministic: bool = _flag(
        False,
        "machine",
        "let attention's backward pass on a GPU add in one order, which takes longer: then equal "
        "runs give equal bits there too",
    )

    def __post_init__(self) -> None:
        for name in ("batch_size", "gradient_accumulation_steps", "logging_steps", "max_bad_steps"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        at_least_0 = ("eval_steps", "save_steps", "save_total_limit", "sample_steps", "inspect")
        at_least_0 += ("early_stopping_patience", "neftune_noise_alpha", "dataset_num_proc")
        at_least_0 += ("weight_decay", "max_grad_norm")
        for name in at_least_0:
            self._require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("learning_rate", "loraplus_lr_ratio"):
            self._require(name, getattr(self, name) > 0, "positive")
        self._require("epochs", self.epochs > 0, "positive")
        self._require("eval_fraction", 0 <= self.eval_fraction < 1, "in [0, 1)")
        self._require(
            "eval_fraction",
            not (self.eval_fraction and self.eval_data),
            "0 where --eval-data is given",
        )
        self._require("warmup_ratio", 0 <= self.warmup_ratio <= 1, "in [0, 1]")
        self._require("max_steps", self.max_steps >= -1, "at least 0, or -1 to go by --epochs")
        self._require(
            "max_length", self.max_length == 0 or self.max_length >= 2, "at least 2, or 0"
        )
        # what torch.Generator takes
        self._require("seed", -(2**63) <= self.seed < 2**64, "in [-2^63, 2^64)")
        self._require("resume", self.resume in ("", "auto"), "auto, or be left bare")
        self._require(
            "group_by_length",
            not self.group_by_length or (self.shuffle and not self.packing),
            "given with --shuffle and without --packing, which leaves no padding",
        )
        for f in fields(self):
            value = getattr(self, f.name)
            choices = f.metadata["choices"]
            self._require(f.name, not choices or value in choices, f"one of {choices}")
            is_finite = not isinstance(value, float) or math.isfinite(value)
            self._require(f.name, is_finite, "finite")
            # the seed has bounds of its own
            is_counted = f.name != "seed" and type(value) is int
            self._require(f.name, not is_counted or value < 1 << 63, "less than 2^63")

        self._require(
            "max_memory",
            not self.max_memory or _SIZE.fullmatch(self.max_memory) is not None,
            "a size such as 24GiB, 24GB or 800MiB",
        )
        self._require(
            "optimizer_residency",
            self.optimizer_residency == "auto" or self.optim != "adamw",
            "auto with --optim adamw, whose moments do not move",
        )

    @property
    def max_memory_bytes(self) -> int | None:
        """--max-memory in bytes; None where it is not given."""
        found = _SIZE.fullmatch(self.max_memory)
        return int(float(found[1]) * _UNITS[found[2]]) if found else None

    def _require(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(f"{_flag_name(name)} must be {what}: got {getattr(self, name)}")


def _flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def _default(f: Field) -> Any:
    assert f.default is not MISSING
    return f.default


def build_parser() -> argparse.ArgumentParser:
    """The command line of train.py: one flag per field of TrainConfig, and --config."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Fine-tune a Llama checkpoint with QLoRA. "
        "Without --model and --data: a bundled tiny model on bundled data.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="a config.json of an earlier run; flags override it")
    groups: dict[str, Any] = {}
    for f in fields(TrainConfig):
        name, default = f.metadata["group"], _default(f)
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        help = f.metadata["help"] + ("" if default in ("", None) else f" (default: {default})")
        # absent means: not given on the command line
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": help}
        if isinstance(default, bool) or default is None:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": type(default), "choices": f.metadata["choices"]}
            options["metavar"] = None if f.metadata["choices"] else type(default).__name__.upper()
        if f.metadata["bare"] is not None:
            options |= {"nargs": "?", "const": f.metadata["bare"]}
            without = {"dest": f.name, "action": "store_const", "const": default}
            groups[name].add_argument(
                _flag_name(f"no_{f.name}"), default=argparse.SUPPRESS, **without
            )
        groups[name].add_argument(_flag_name(f.name), **options)
    return parser


def parse_config(arguments: Sequence[str], without_model: dict[str, Any]) -> TrainConfig:
    """Read the command line, over the file of --config if given, over the defaults.

    Args:
        without_model: the fields of a run that names neither a model nor data.

    Raises:
        ValueError: a value out of range, a model without data or the reverse, or a config file
            with other fields.
    """
    given = vars(build_parser().parse_args(arguments))
    file = given.pop("config")
    given = _expand_home(given)
    values = read_fields(Path(file).expanduser()) | given if file else given
    if not values.get("model") and not values.get("data"):
        values = without_model | values
    config = TrainConfig(**values)
    if not config.model or not config.data:
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


def _expand_home(values: dict[str, Any]) -> dict[str, Any]:
    """Write out the ~ of places on the disk."""
    places = {name: os.path.expanduser(values[name]) for name in _PLACES if name in values}
    return values | places


def read_fields(path: Path) -> dict[str, Any]:
    """Read the fields of a config.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON, or has other fields or kinds of value than TrainConfig.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"--config must be the config.json of a run: there is no file {path}"
        )
    with Reading(path):
        return _expand_home(_checked(path, read_object(path)))


def _checked(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    if isinstance(values.get("resume"), bool):
        # a switch, in folders that version 0.1 began
        values["resume"] = "auto" if values["resume"] else ""
    defaults = {f.name: _default(f) for f in fields(TrainConfig)}
    # a switch that is decided later may be on, off or not given
    kinds = {
        name: (bool, type(None)) if default is None else (type(default),)
        for name, default in defaults.items()
    }
    if unknown := sorted(set(values) - set(kinds)):
        raise ValueError(
            f"{path} must hold fields of a training run only: got {', '.join(unknown)}; "
            "give the config.json of an output folder"
        )
    for name, value in values.items():
        if kinds[name] == (float,) and type(value) is int:
            values[name] = float(value)
        elif type(value) not in kinds[name]:
            raise ValueError(f"{path}: {name} must be {kinds[name][0].__name__}: got {value!r}")
    return values


def to_json(config: TrainConfig) -> str:
    return json.dumps(asdict(config), indent=2) + "\n"


def differences(config: TrainConfig, path: Path) -> list[str]:
    """What makes a config another run than that of a config.json, a line for each field."""
    earlier = read_fields(path)
    # where the run may end
    decides = {"eval_steps"} if config.early_stopping_patience else set()
    return [
        f"{_flag_name(name)} was {earlier.get(name)!r}, now {value!r}"
        for name, value in asdict(config).items()
        if name not in FREE_ON_RESUME - decides and earlier.get(name) != value
    ]
