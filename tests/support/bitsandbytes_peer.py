"""Quantizes and dequantizes with bitsandbytes on the CPU; run by `peer_process.run_peer`.

In: "weight/NAME" tensors, "scales/NAME" vectors (centred), and as metadata the block sizes of each
weight. Out: for every weight and block size what bitsandbytes stores and what it expands that to,
for every vector of scales its codes.
"""

import json

import bitsandbytes.functional as bnb
import torch
from safetensors import safe_open
from safetensors.torch import save_file


def expand(packed, state, num_elements):
    # flat: with AVX-512 a matrix whose rows are no whole blocks gets the wrong scales
    state.shape = (num_elements,)
    return bnb.dequantize_4bit(packed, state).reshape(-1)


def quantize(weight, block_size):
    packed, state = bnb.quantize_4bit(
        weight, blocksize=block_size, compress_statistics=True, quant_type="nf4"
    )
    plain_packed, plain_state = bnb.quantize_4bit(
        weight, blocksize=block_size, compress_statistics=False, quant_type="nf4"
    )
    assert torch.equal(packed, plain_packed)
    assert state.code is not None
    assert state.state2 is not None
    assert state.state2.code is not None
    assert state.offset is not None
    return {
        "packed": packed.flatten(),
        "absmax": plain_state.absmax,
        "expanded": expand(packed, plain_state, weight.numel()),
        "nested_codes": state.absmax,
        "nested_group_absmax": state.state2.absmax,
        "nested_mean": state.offset.view(1),
        "nested_expanded": expand(packed, state, weight.numel()),
    }, (state.code, state.state2.code)


def main():
    results = {}
    with safe_open("in.safetensors", "pt") as file:
        block_sizes = json.loads(file.metadata()["block_sizes"])
        for key in file.keys():  # noqa: SIM118, safe_open is no mapping
            kind, name = key.split("/", 1)
            tensor = file.get_tensor(key)
            if kind == "scales":
                dynamic_map = bnb.create_dynamic_map().to(torch.float32)
                codes, _ = bnb.quantize_blockwise(tensor, code=dynamic_map, blocksize=256)
                results[key] = codes
                continue
            for block_size in block_sizes[name]:
                stored, maps = quantize(tensor, block_size)
                for part, value in stored.items():
                    results[f"{name}/{block_size}/{part}"] = value.clone()
                results["levels"], results["dynamic_map"] = (value.clone() for value in maps)
    save_file(results, "out.safetensors")


if __name__ == "__main__":
    main()
