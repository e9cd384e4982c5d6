"""The flags of train.py, in the groups of --help: each with its default, its help and its range.

    learning_rate: float = _flag(2e-4, ...)    ->    --learning-rate 2e-4

Names are those of transformers' TrainingArguments and PEFT's LoraConfig where one exists. In
run/config.py the groups become the bases of one TrainConfig. A function that reads a single group
takes that group, so its signature says which flags decide what it does.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from run.places import read_places

_UNITS = {"GiB": 1 << 30, "MiB": 1 << 20, "GB": 10**9, "MB": 10**6}
_SIZE = re.compile(rf"(\d+(?:\.\d+)?) ?({'|'.join(_UNITS)})?")

BASE_COMPUTES = ("bf16", "int8", "fp8", "fp8-backward")


def _flag(
    default: Any,
    help: str,
    choices: tuple[str, ...] | None = None,
    bare: str | None = None,
    also: Mapping[str, str] | None = None,
    is_list: bool = False,
    adds_up: bool = False,
) -> Any:
    """Describe a flag.

    Args:
        bare: the value of the flag where none follows it; such a flag has a --no-flag, too.
        also: other programs' names of values, each with ours.
        is_list: the value is texts separated by commas.
        adds_up: given again, such a flag has one more; another flag has its last value.
    """
    metadata = {"help": help, "choices": choices, "bare": bare, "also": also or {}}
    metadata |= {"is_list": is_list, "adds_up": adds_up}
    return field(default=default, metadata=metadata)


# a number of steps that is an epoch's, whatever that is
EPOCH = -1
_EACH_EPOCH = {"epoch": str(EPOCH)}


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class _Flags:
    """The base of all groups. A group checks its own fields first, and then calls super().

    Raises:
        ValueError: a value out of range.
    """

    def __post_init__(self) -> None:
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            self._require(f.name, not choices or value in choices, f"one of {choices}")
            is_finite = not isinstance(value, float) or math.isfinite(value)
            self._require(f.name, is_finite, "finite")
            # the seed has bounds of its own
            is_counted = f.name != "seed" and type(value) is int
            self._require(f.name, not is_counted or value < 1 << 63, "less than 2^63")

    def _require(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(f"{flag_name(name)} must be {what}: got {getattr(self, name)}")

    def _require_at_least(self, least: int, *names: str) -> None:
        for name in names:
            self._require(name, getattr(self, name) >= least, f"at least {least}")


@dataclass(frozen=True)
class ModelFlags(_Flags):
    """The base model, how its frozen weights are stored, and where it computes."""

    model: str = _flag("", "checkpoint folder or hub id, @revision if wanted")
    quant: str = _flag("nf4", "number format of the frozen weights", ("nf4", "none"))
    block_size: int = _flag(64, "weights that share a scale: 32 to 4096")
    double_quant: bool = _flag(True, "quantize the scales to 8 bits")
    dtype: str = _flag(
        "auto",
        "number format of the computation; auto: bfloat16 on a GPU that has it, float16 on "
        "another GPU, float32 on a CPU",
        ("auto", "bfloat16", "float16", "float32"),
        also={"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "None": "auto"},
    )
    base_compute: str = _flag(
        "bf16",
        "number format of the frozen projections' products in training; bf16: that of --dtype; "
        "int8, fp8: INT8 behind a rotation, or E4M3, in the MLP's forward pass, and E4M3 in the "
        "backward pass, in half of the time; fp8-backward: in the backward pass alone; on GPUs of "
        "compute capability 8.9 or later, with evaluations and answers in --dtype",
        BASE_COMPUTES,
    )
    device: str = _flag("auto", "auto: a GPU if there is one", ("auto", "cpu", "cuda"))


@dataclass(frozen=True)
class DataFlags(_Flags):
    """The data, and how samples are made of it."""

    data: str = _flag(
        "",
        "training data: a .jsonl, .json, .csv, .txt (each also .gz) or .parquet file, a "
        "folder of them, or a hub id; again, or after a comma, for several; PLACE=0.5 has half of "
        "its samples in each epoch, PLACE=2 each of them twice",
        is_list=True,
        adds_up=True,
    )
    eval_data: str = _flag("", "evaluation data, in the same forms as --data")
    subset: str = _flag(
        "",
        "subset of a data set that has several; where several data sets have them, names separated "
        "by commas: each takes the one that it has",
        is_list=True,
    )
    split: str = _flag(
        "",
        "split to learn from, where it is not the one called train; a+b: two as one; names as for "
        "--subset",
        is_list=True,
    )
    eval_split: str = _flag("", "split of --eval-data, by default validation or else test")
    eval_fraction: float = _flag(
        0.0, "share of --data held out for evaluation instead, chosen by the samples' content"
    )
    data_format: str = _flag(
        "auto",
        "format of the records",
        ("auto", "messages", "sharegpt", "alpaca", "prompt-completion", "text", "tokenized"),
    )
    fields: str = _flag(
        "",
        "which field of the records is which of ours, as in instruction=question,output=answer",
        is_list=True,
    )
    ignore_fields: str = _flag(
        "", "fields of records and messages to ignore, separated by commas", is_list=True
    )
    max_length: int = _flag(
        0, "tokens of the longest sample; 0: the model's positions, at most 2048"
    )
    group_by_length: bool = _flag(
        False, "put samples of similar lengths into one micro-batch, which needs less padding"
    )
    packing: bool | None = _flag(
        None,
        "put several samples into each row of --max-length tokens; no sample sees another; by "
        "default on a GPU of compute capability 8.0 or later",
    )
    train_on: str = _flag("completions", "tokens that have a loss", ("completions", "all"))
    chat_template: str = _flag(
        "",
        "a bundled template (chatml, gemma, llama-3, llama-3.1, mistral, phi, qwen), a .jinja "
        "file, or the name of one of the checkpoint's templates",
    )
    system_prompt: str = _flag("", "system message for conversations that have none")
    shuffle: bool = _flag(True, "shuffle the samples anew in each epoch")
    skip_bad_lines: bool = _flag(False, "leave out malformed records, and say how many")
    allow_truncation: bool = _flag(
        False, "go on even if more than half of the records are cut to --max-length"
    )
    inspect: int = _flag(0, "show this many samples with their learned tokens marked, and stop")
    dataset_num_proc: int = _flag(0, "processes that tokenize; 0: chosen by the size of the data")

    def __post_init__(self) -> None:
        self._require_at_least(0, "inspect", "dataset_num_proc")
        read_places(self.data)
        for name in ("split", "eval_split"):
            self._require(
                name,
                "[" not in getattr(self, name),
                "the name of a split, not a slice (--eval-fraction 0.1 sets a tenth aside for "
                "evaluation, --max-steps ends a run early)",
            )
        self._require("eval_fraction", 0 <= self.eval_fraction < 1, "in [0, 1)")
        has_both = bool(self.eval_fraction and self.eval_data)
        self._require("eval_fraction", not has_both, "0 where --eval-data is given")
        self._require(
            "max_length", self.max_length == 0 or self.max_length >= 2, "at least 2, or 0"
        )
        self._require(
            "group_by_length",
            not self.group_by_length or (self.shuffle and not self.packing),
            "given with --shuffle and without --packing, which leaves no padding",
        )
        super().__post_init__()


@dataclass(frozen=True)
class AdapterFlags(_Flags):
    """The adapter that is trained."""

    lora_r: int = _flag(16, "rank of the update")
    lora_alpha: float = _flag(32.0, "the update is scaled by alpha / r")
    lora_dropout: float = _flag(0.0, "dropout before lora_A")
    target_modules: str = _flag(
        "all-linear",
        "projections to adapt: all-linear, or names separated by commas",
        also={"all": "all-linear"},
        is_list=True,
    )
    target_parameters: str = _flag(
        "",
        "tensors of all experts to adapt: gate_up_proj, down_proj, or both separated by a comma",
        is_list=True,
    )
    use_rslora: bool = _flag(False, "scale by alpha / sqrt(r)")
    init_adapter: str = _flag(
        "",
        "adapter folder or hub id to start from; where they are not given, rank, alpha, targets "
        "and rsLoRA are the adapter's",
    )


@dataclass(frozen=True)
class TrainingFlags(_Flags):
    """The length of the run and of its steps, the optimizer and its schedule, evaluation."""

    batch_size: int = _flag(4, "samples, or packed rows, in a micro-batch")
    gradient_accumulation_steps: int = _flag(4, "micro-batches in a step, on each rank")
    epochs: float = _flag(1.0, "passes over the data")
    max_steps: int = _flag(-1, "number of steps, instead of --epochs; 0: evaluate only")
    optim: str = _flag(
        "paged_adamw_32bit",
        "paged: moments in CUDA unified memory; 8bit: quantized in blocks",
        ("paged_adamw_32bit", "paged_adamw_8bit", "adamw"),
        also={
            "paged_adamw": "paged_adamw_32bit",
            "adamw_torch": "adamw",
            "adamw_torch_fused": "adamw",
            "adamw_8bit": "paged_adamw_8bit",
            "adamw_bnb_8bit": "paged_adamw_8bit",
        },
    )
    optimizer_residency: str = _flag(
        "auto",
        "where paged moments are kept between steps; auto: on the host if less than twice "
        "their size is free on the device at the start",
        ("auto", "device", "host"),
    )
    learning_rate: float = _flag(2e-4, "the highest rate of the schedule")
    loraplus_lr_ratio: float = _flag(1.0, "LoRA+: the rate of lora_B over that of lora_A")
    lr_scheduler: str = _flag(
        "cosine",
        "decay after the warm-up",
        ("cosine", "linear", "constant"),
        also={"constant_with_warmup": "constant"},
    )
    warmup_ratio: float = _flag(0.03, "share of the steps in which the learning rate rises")
    warmup_steps: int = _flag(0, "steps in which it rises, instead of --warmup-ratio")
    adam_beta1: float = _flag(0.9, "share of the first moment that a step keeps")
    adam_beta2: float = _flag(0.999, "share of the second moment that a step keeps")
    weight_decay: float = _flag(0.0, "decoupled decay of the adapter")
    max_grad_norm: float = _flag(1.0, "clip the gradient norm to this; 0: no clipping")
    eval_steps: int = _flag(
        0,
        "steps between evaluations, or epoch, which is -1: at the end of each; 0: only at the "
        "start and the end of the run",
        also=_EACH_EPOCH,
    )
    early_stopping_patience: int = _flag(
        0,
        "stop after this many evaluations in a row without a lower eval_loss, and save the "
        "adapter that had the lowest; 0: train to the last step and save its adapter",
    )
    neftune_noise_alpha: float = _flag(
        0.0, "NEFTune: noise of alpha / sqrt(tokens x hidden size) on embeddings; 0: none"
    )
    router_aux_loss_coef: float = _flag(
        0.0, "weight of the auxiliary loss that spreads tokens evenly over experts; 0: none"
    )
    max_bad_steps: int = _flag(
        30,
        "stop after this many steps in a row whose loss or gradients are not finite; each of "
        "them is skipped; float16 has some at first, until its loss scale fits",
    )
    seed: int = _flag(
        42, "decides the adapter's initial values, the order of the samples and the dropout"
    )
    deterministic: bool = _flag(
        False,
        "add in a fixed order in attention's backward pass on a GPU, which is slower; equal "
        "runs then give equal bits on a GPU, too",
    )

    def __post_init__(self) -> None:
        self._require_at_least(1, "batch_size", "gradient_accumulation_steps", "max_bad_steps")
        self._require_at_least(0, "weight_decay", "max_grad_norm", "warmup_steps")
        self._require_at_least(0, "early_stopping_patience", "neftune_noise_alpha")
        self._require_at_least(0, "router_aux_loss_coef")
        self._require_at_least(EPOCH, "eval_steps")
        self._require("epochs", self.epochs > 0, "positive")
        self._require("max_steps", self.max_steps >= -1, "at least 0, or -1 to go by --epochs")
        # the seeds that torch.Generator takes
        self._require("seed", -(2**63) <= self.seed < 2**64, "in [-2^63, 2^64)")
        for name in ("learning_rate", "loraplus_lr_ratio"):
            self._require(name, getattr(self, name) > 0, "positive")
        for name in ("adam_beta1", "adam_beta2"):
            # their bias corrections are a table, which takes 0.5 s and 6 MB for 0.9999
            self._require(name, 0 <= getattr(self, name) <= 0.9999, "in [0, 0.9999]")
        self._require("warmup_ratio", 0 <= self.warmup_ratio <= 1, "in [0, 1]")
        has_both = bool(self.warmup_steps and self.warmup_ratio)
        self._require("warmup_steps", not has_both, "given without --warmup-ratio")
        self._require(
            "optimizer_residency",
            self.optimizer_residency == "auto" or self.optim != "adamw",
            "auto with --optim adamw, whose moments do not move",
        )
        super().__post_init__()


@dataclass(frozen=True)
class MemoryFlags(_Flags):
    """The GPU's memory: what it is spent on, how much may be used, and what a run would use."""

    activations: str = _flag(
        "auto",
        "activations of each layer: keep them for the backward pass, recompute them from the "
        "layer's input, or offload that input to the host; expand: keep them, and the weights as "
        "products read them; auto: the fastest mix that fits",
        ("auto", "expand", "keep", "recompute", "offload"),
    )
    max_memory: str = _flag(
        "", "GPU memory to use, such as 24GiB, or 24 for that; by default all that is free"
    )
    plan: bool = _flag(
        False,
        "print the memory and the time that the run needs, and stop; config.json is enough for it, "
        "and without --data it is for full rows",
    )
    gpu: str = _flag("", "plan for this GPU, such as 4090 or A100-80, which need not be here")

    def __post_init__(self) -> None:
        self._require(
            "max_memory",
            not self.max_memory or _SIZE.fullmatch(self.max_memory) is not None,
            "a size such as 24GiB, 24GB, 800MiB or 24, which is in GiB",
        )
        self._require("gpu", self.plan or not self.gpu, "given with --plan")
        super().__post_init__()

    @property
    def max_memory_bytes(self) -> int | None:
        """--max-memory in bytes; None where it is not given."""
        found = _SIZE.fullmatch(self.max_memory)
        return int(float(found[1]) * _UNITS[found[2] or "GiB"]) if found else None


@dataclass(frozen=True)
class OutputFlags(_Flags):
    """The results of a run: where they are, what is kept and shown on the way, who is told."""

    output: str = _flag("", "folder for the results; by default the next free out/run-N")
    resume: str = _flag(
        "",
        "folder of a run to go on with, under its own settings; no value, or auto: the one in "
        "--output, under the flags that are given; from the last whole checkpoint, or from the "
        "first step if there is none",
        bare="auto",
        # a switch, in folders that version 0.1 began
        also={"true": "auto", "false": ""},
    )
    save_steps: int = _flag(
        100,
        "steps between checkpoints, or epoch, which is -1: at the end of each; 0: no checkpoints",
        also=_EACH_EPOCH,
    )
    save_total_limit: int = _flag(
        0, "checkpoints to keep; the oldest is removed once the new one is whole; 0: keep all"
    )
    logging_steps: int = _flag(1, "steps between rows of metrics")
    sample_prompt: str = _flag("", "a prompt to answer before and after training")
    sample_steps: int = _flag(
        0, "steps between answers to --sample-prompt; 0: only at the start and the end"
    )
    report_to: str = _flag(
        "",
        "trackers, separated by commas: tensorboard, wandb, trackio; each is an optional extra",
        also={"none": ""},
        is_list=True,
    )
    push_to_hub: str = _flag("", "hub id to upload the adapter to; a new repository is private")

    def __post_init__(self) -> None:
        self._require_at_least(1, "logging_steps")
        self._require_at_least(0, "save_total_limit", "sample_steps")
        self._require_at_least(EPOCH, "save_steps")
        self._require("resume", self.resume in ("", "auto"), "auto, or be left bare")
        super().__post_init__()
