"""nf4/serialized.py: the JSON, the names and the bytes; what bitsandbytes makes of them is tested
in test_checkpoint_stored_nf4.py."""

import json
import struct

import pytest
import torch
from support.equality import assert_equal

from nf4.double_quant import DYNAMIC_MAP, QuantizedAbsmax
from nf4.levels import LEVELS
from nf4.serialized import (
    STATE,
    WeightState,
    format_state,
    parse_state,
    restore_state,
    serialize,
    stored_buffers,
)
from nf4.weight import Quantization, dequantize, empty_weight, quantize

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize("mean", [None, 0.0, 0.1, -1e-45, 3.4028234663852886e38, 1 / 3])
def test_a_state_survives_its_json(mean: float | None) -> None:
    state = WeightState((5, 7), "bfloat16", 128, mean)
    assert parse_state(format_state(state), "x") == state


def test_states_of_all_means_are_equally_long() -> None:
    # the longest decimals that a float64 has, and a float32
    extremes = [-2.2250738585072014e-308, struct.unpack("f", b"\x01\0\0\x80")[0], 0.0, 1.5]
    texts = [format_state(WeightState((5, 7), "float16", 64, mean)) for mean in extremes]
    assert len({len(text) for text in texts}) == 1
    for text, mean in zip(texts, extremes, strict=True):
        assert json.loads(text)["nested_offset"] == mean


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (129, 257)])
def test_a_weight_survives_being_stored(shape: tuple[int, int], double_quant: bool) -> None:
    weight = quantize(torch.randn(shape), 64, double_quant)
    stored = serialize(weight, torch.float32)
    state = parse_state(bytes(stored[STATE].tolist()), "x")
    assert (state.shape, state.dtype) == (shape, "float32")
    assert state.quantization == Quantization(64, double_quant)
    assert_equal(stored[".quant_map"], LEVELS)
    if double_quant:
        assert_equal(stored[".nested_quant_map"], DYNAMIC_MAP)
    copy = empty_weight(shape[:1], shape[1], *state.quantization, CPU)
    for suffix, home in stored_buffers(copy).items():
        home.copy_(stored[suffix])
    restore_state(copy, state)
    if isinstance(weight.absmax, QuantizedAbsmax) and isinstance(copy.absmax, QuantizedAbsmax):
        assert_equal(copy.absmax.mean, weight.absmax.mean)
    assert_equal(dequantize(copy, torch.float32), dequantize(weight, torch.float32))


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_weight_without_values_says_what_will_be_stored(double_quant: bool) -> None:
    planned = serialize(empty_weight((129,), 257, 64, double_quant, META), torch.bfloat16)
    stored = serialize(quantize(torch.randn(129, 257), 64, double_quant), torch.bfloat16)
    assert planned.keys() == stored.keys()
    for suffix, part in stored.items():
        assert (planned[suffix].shape, planned[suffix].dtype) == (part.shape, part.dtype)
