"""The flags of quantize.py."""

import argparse

from foreign.command_line import Parser


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="quantize.py",
        description="Write a checkpoint in NF4, as transformers and bitsandbytes do.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="checkpoint folder or hub id")
    parser.add_argument("--output", required=True, help="a new folder for the quantized one")
    parser.add_argument(
        "--block-size", type=int, default=64, help="weights that share a scale: 32 to 4096"
    )
    parser.add_argument(
        "--double-quant",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="quantize the scales to 8 bits",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float16", "float32"),
        help="dtype of the tensors that are not quantized; auto: as they are stored",
    )
    parser.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="device that quantizes; auto: a GPU if there is one",
    )
    return parser
