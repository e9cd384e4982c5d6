"""checkpoint/number_formats.py: every number format that config.json may name has one name here."""

from typing import Any

import pytest

from checkpoint.number_formats import number_format

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("described", "name"),
    [
        (None, None),
        (NF4, "bitsandbytes nf4"),
        (NF4 | {"bnb_4bit_quant_storage": "bfloat16"}, "bitsandbytes nf4"),
        (NF4 | {"quant_method": None}, "bitsandbytes nf4"),
        (NF4 | {"bnb_4bit_quant_type": "fp4"}, "bitsandbytes fp4"),
        # transformers' default
        ({"load_in_4bit": True}, "bitsandbytes fp4"),
        (NF4 | {"load_in_4bit": False, "load_in_8bit": True}, "bitsandbytes int8"),
        ({"load_in_8bit": True}, "bitsandbytes int8"),
        (NF4 | {"load_in_4bit": False}, "bitsandbytes"),
        ({"quant_method": "gptq", "load_in_4bit": True}, "gptq"),
        ({"quant_method": "fp8"}, "fp8"),
        ("awq", "awq"),
        ({}, "an unnamed method"),
    ],
    ids=str,
)
def test_the_number_format_is_named(described: Any, name: str | None) -> None:
    assert number_format({"quantization_config": described}) == name
