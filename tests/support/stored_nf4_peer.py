"""transformers and bitsandbytes on checkpoints in NF4; run by `peer_process.run_peer`.

In: "input_ids", and as metadata the jobs: a checkpoint to quantize and how, where to save it, and
one that is quantized already. Out: "JOB/theirs/..." and "JOB/ours/..." for each of the two folders,
as loaded from it: logits, the same with expanded weights and in float64, and of each 4-bit weight
what it holds and expands to.
"""

import json
from typing import Any

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def quantize(job: dict[str, Any]) -> Any:
    """Quantize a checkpoint while it loads; transformers has no setting for the block size."""
    block_size, double_quant = job["quantization"]
    options = {"dtype": getattr(torch, job["dtype"]), "device_map": "cpu"}
    configuration = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=job["storage"],
        llm_int8_skip_modules=job["skip"],
    )
    model = AutoModelForCausalLM.from_pretrained(
        job["source"], quantization_config=configuration, **options
    )
    if block_size == 64:
        return model
    original = AutoModelForCausalLM.from_pretrained(job["source"], **options)
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            # typed as a module, which it is not
            make: Any = Params4bit
            module.weight = make(
                original.get_parameter(f"{name}.weight").detach(),
                requires_grad=False,
                quant_type="nf4",
                compress_statistics=double_quant,
                blocksize=block_size,
            ).to("cpu")
    return model


def describe(weight: Any) -> dict[str, Tensor]:
    state = weight.quant_state
    found = {"packed": weight.detach().view(torch.uint8).flatten(), "absmax": state.absmax}
    if state.nested:
        found |= {"group_absmax": state.state2.absmax, "mean": state.offset.view(1)}
    # flat: with AVX-512 a matrix whose rows are no whole blocks gets the wrong scales
    shape, state.shape = state.shape, (state.shape.numel(),)
    dtype, state.dtype = state.dtype, torch.float32
    found["expanded"] = bnb.dequantize_4bit(weight, state).view(shape)
    state.shape, state.dtype = shape, dtype
    return found


def compute(folder: str, input_ids: Tensor) -> dict[str, Tensor]:
    """Load a checkpoint in NF4 and run it as it is, and with its weights expanded."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for parameter in model.parameters():
        if not isinstance(parameter, Params4bit):
            # loading keeps the checkpoint's dtype, whatever is asked for
            parameter.data = parameter.data.float()
    # in eval mode the CPU backend repacks a weight at its first forward, with rounded scales
    model.train()
    output = {}
    with torch.no_grad():
        output["logits"] = model(input_ids=input_ids).logits
        for name, module in list(model.named_modules()):
            if not isinstance(module, Linear4bit):
                continue
            weight: Any = module.weight
            found = describe(weight)
            output |= {f"{name}.weight/{part}": value for part, value in found.items()}
            plain = nn.Linear(*weight.quant_state.shape[::-1], bias=module.bias is not None)
            plain.weight.copy_(found["expanded"])
            if module.bias is not None:
                plain.bias.copy_(module.bias)
            model.set_submodule(name, plain)
        output["logits.expanded"] = model(input_ids=input_ids).logits
        output["logits.float64"] = model.double()(input_ids=input_ids).logits
    return output


def main() -> None:
    with safe_open("in.safetensors", framework="pt") as file:
        jobs = json.loads(file.metadata()["jobs"])
        input_ids = file.get_tensor("input_ids")
    outputs = {}
    for name, job in jobs.items():
        quantize(job).save_pretrained(job["theirs"], max_shard_size=job["shard"])
        for kind in ("theirs", "ours"):
            if job[kind]:
                found = compute(job[kind], input_ids)
                outputs |= {f"{name}/{kind}/{k}": v.clone() for k, v in found.items()}
    save_file(outputs, "out.safetensors")


if __name__ == "__main__":
    main()
