"""The flags of generate.py, and what must hold of each alone and of all together."""

import argparse
import math
from collections.abc import Sequence

from foreign.command_line import Parser

# where no flag says it: prompts that are answered at a time, and tokens of the longest answer
DEFAULT_BATCH_SIZE = 8
DEFAULT_NEW_TOKENS = 512

# names of Unsloth, TRL and LLaMA-Factory
ALSO = {
    "--model-name-or-path": "--model",
    "--model-name": "--model",
    "--adapter-name-or-path": "--adapter",
    "--load-in-4bit": "--quant nf4",
}


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="generate.py",
        description="Let a model, alone or with an adapter, answer prompts or talk.",
        also=ALSO,
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        default="",
        help="checkpoint folder or hub id, @revision if wanted (default: the adapter's base)",
    )
    model.add_argument("--adapter", default="", help="adapter folder or hub id, ours or PEFT's")
    model.add_argument(
        "--other-base",
        action="store_true",
        help="go on although --model is not the checkpoint that the adapter was trained on",
    )
    model.add_argument(
        "--quant",
        choices=("auto", "nf4", "none"),
        default="auto",
        help="number format of the frozen weights; auto: as the adapter was trained beside them, "
        "without an adapter as they are stored (default: auto)",
    )
    asked = parser.add_argument_group("prompts")
    one_of = asked.add_mutually_exclusive_group(required=True)
    one_of.add_argument("--prompt", help="a prompt to answer")
    one_of.add_argument("--chat", action="store_true", help="talk with the model")
    one_of.add_argument(
        "--prompts",
        help='file of prompts: a .txt with one in each line, or records with "prompt" or '
        '"messages" in .jsonl, .json, .csv or .parquet',
    )
    asked.add_argument(
        "--output", default="", help="new file for the answers to --prompts, in JSON lines"
    )
    asked.add_argument(
        "--system-prompt",
        default=None,
        help="a message of the system before each conversation; by default the --system-prompt "
        'that the adapter was trained with; "": none',
    )
    asked.add_argument(
        "--chat-template",
        default="",
        help="a bundled template (chatml, gemma, llama-3, llama-3.1, mistral, phi, qwen), a .jinja "
        "file, or the name of one of the checkpoint's templates",
    )
    asked.add_argument(
        "--raw", action="store_true", help="continue prompts as they stand, without a template"
    )
    choice = parser.add_argument_group("answers")
    choice.add_argument(
        "--max-new-tokens",
        type=int,
        help=f"tokens of the longest answer (default: {DEFAULT_NEW_TOKENS}, or what there is room "
        "for)",
    )
    choice.add_argument(
        "--max-length",
        type=int,
        default=0,
        help="tokens of the longest prompt and its answer; 0: the model's positions, for --chat at "
        "most 8192 (default: 0)",
    )
    choice.add_argument(
        "--temperature",
        type=float,
        help="divides the logits; 0: the most probable token (default: that of "
        "generation_config.json if it samples, else 0)",
    )
    choice.add_argument(
        "--top-k",
        type=int,
        help="draw from so many most probable tokens; 0: from all (default: as --temperature's)",
    )
    choice.add_argument(
        "--top-p",
        type=float,
        help="draw from the fewest tokens whose probabilities add up to this "
        "(default: as --temperature's, or 1)",
    )
    choice.add_argument(
        "--repetition-penalty",
        type=float,
        help="makes tokens of prompt and answer less probable (default: generation_config.json's, "
        "or 1)",
    )
    choice.add_argument("--seed", type=int, default=42, help="decides what is drawn (default: 42)")
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--batch-size",
        type=int,
        help=f"prompts that are answered at a time (default: {DEFAULT_BATCH_SIZE})",
    )
    machine.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: a GPU if there is one (default: auto)",
    )
    machine.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        help="number format of the computation; auto: bfloat16 on a GPU that has it, float16 on "
        "another GPU, float32 on a CPU (default: auto)",
    )
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ValueError: a value is out of range, or flags contradict each other.
    """
    given = build_parser().parse_args(arguments)
    _check_ranges(given)
    if not given.model and not given.adapter:
        raise ValueError("--adapter or --model must be given: got neither")
    if given.other_base and not (given.model and given.adapter):
        raise ValueError("--other-base must be given with --adapter and --model")
    if bool(given.output) != bool(given.prompts):
        there, missing = ("--output", "--prompts") if given.output else ("--prompts", "--output")
        raise ValueError(f"{there} must be given with {missing}: got none")
    if given.batch_size is not None and not given.prompts:
        raise ValueError("--batch-size must be given with --prompts: otherwise there is one prompt")
    for name, value in (
        ("--chat", given.chat),
        ("--system-prompt", given.system_prompt),
        ("--chat-template", given.chat_template),
    ):
        if given.raw and value:
            raise ValueError(f"--raw continues a text as it stands: leave out {name}")
    return given


def _check_ranges(given: argparse.Namespace) -> None:
    """Refuse numbers out of range; None is a flag that is not given."""
    ranges = {
        "max_new_tokens": (1, math.inf, "at least 1"),
        "max_length": (0, math.inf, "at least 2, or 0"),
        "temperature": (0, 1e6, "from 0 to 1e6"),
        "top_k": (0, math.inf, "at least 0"),
        "top_p": (0, 1, "above 0 and at most 1"),
        "repetition_penalty": (0, 1e6, "above 0 and at most 1e6"),
        "batch_size": (1, math.inf, "at least 1"),
        # as --seed of train.py
        "seed": (-(2**63), 2**64 - 1, "in [-2^63, 2^64)"),
    }
    without_least = {"top_p", "repetition_penalty"}
    for name, (least, most, what) in ranges.items():
        value = getattr(given, name)
        if value is None:
            continue
        is_in_range = least <= value <= most and not (name in without_least and value == least)
        if not is_in_range or (name == "max_length" and value == 1):
            raise ValueError(f"--{name.replace('_', '-')} must be {what}: got {value}")
    if given.temperature == 0 and (given.top_k or given.top_p is not None):
        raise ValueError("--top-k and --top-p choose among tokens to draw: give a --temperature")
