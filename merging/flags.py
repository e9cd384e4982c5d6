"""The flags of merge.py."""

import argparse

from foreign.command_line import Parser

# of a GGUF file
TYPES = ("f16", "bf16", "q8_0")

# names of Unsloth and LLaMA-Factory
ALSO = {
    "--model-name-or-path": "--model",
    "--model-name": "--model",
    "--adapter-name-or-path": "--adapter",
    "--save-path": "--output",
    "--export-dir": "--output",
    "--quantization-method": "--gguf",
    "--save-method merged_16bit": "",
}
ELSEWHERE = {"--save-method": "leave it out, the merged model is in the format of its base"}


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="merge.py",
        description="Merge an adapter into its base model's weights.",
        also=ALSO,
        elsewhere=ELSEWHERE,
    )
    parser.add_argument("--adapter", required=True, help="adapter folder or hub id, ours or PEFT's")
    parser.add_argument("--output", required=True, help="new folder for the merged model")
    parser.add_argument(
        "--model",
        default="",
        help="the base: checkpoint folder or hub id (default: what the adapter says)",
    )
    parser.add_argument(
        "--base",
        choices=("original", "nf4"),
        default="original",
        help="weights to merge into: as the checkpoint has them, or quantized to NF4 and back "
        "(default: original)",
    )
    parser.add_argument(
        "--other-base",
        action="store_true",
        help="merge although --model is not the checkpoint that the adapter was trained on",
    )
    parser.add_argument(
        "--gguf",
        choices=TYPES,
        default="",
        help="write a GGUF file of this type, for llama.cpp, and a Modelfile for Ollama, too",
    )
    read = parser.add_mutually_exclusive_group()
    read.add_argument("--text", help="file to measure perplexity and logits on, as plain text")
    read.add_argument(
        "--data",
        default="",
        help="file, folder or hub id to measure on, read as in training: chat template and "
        "learned tokens",
    )
    parser.add_argument(
        "--block-size", type=int, help="block size of NF4 (default: the adapter's run's, or 64)"
    )
    parser.add_argument(
        "--double-quant",
        action=argparse.BooleanOptionalAction,
        help="scales in 8 bits (default: as in the adapter's run, or yes)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        help="dtype of the computation with --text and --data; merged weights keep theirs "
        "(default: auto)",
    )
    return parser
