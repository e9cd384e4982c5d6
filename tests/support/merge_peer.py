"""PEFT merging adapters, and transformers reading what the product merged; run by
`peer_process.run_peer`.

In: "JOB/input_ids", and as metadata the jobs: a checkpoint, an adapter and a merged folder each.
Out: logits and merged weights by job, and facts.json with what PEFT made of the adapter's config.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM


def load(folder: str, dtype: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def with_adapter(
    job: dict[str, Any], dtype: Any, adapter: str = "adapter"
) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(load(job["checkpoint"], dtype), job[adapter])
    return model, [str(each.message) for each in caught]


def sizes_of(model: Any) -> dict[str, tuple[int, float]]:
    return {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


@torch.no_grad()
def run(job: dict[str, Any], input_ids: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    model, said = with_adapter(job, torch.float32)
    output = {"adapter_logits": model(input_ids=input_ids).logits}
    facts: dict[str, Any] = {"warnings": said, "sizes": sizes_of(model)}
    model, said = with_adapter(job, torch.float32, "again")
    output["again_logits"] = model(input_ids=input_ids).logits
    facts["again"] = {"warnings": said, "sizes": sizes_of(model)}
    model, _ = with_adapter(job, "auto")
    paths = sizes_of(model)
    merged = model.merge_and_unload()
    output |= {
        f"merged.{name}": tensor
        for name, tensor in merged.state_dict().items()
        if name.removesuffix(".weight") in paths
    }
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        job["merged"], dtype=torch.float32, output_loading_info=True
    )
    ours, info = loaded
    facts["loading"] = {key: len(found) for key, found in info.items()}
    facts["dtype"] = str(load(job["merged"], "auto").dtype)
    output["our_logits"] = ours.eval()(input_ids=input_ids).logits
    return output, facts


def main() -> None:
    with safe_open("in.safetensors", framework="pt") as file:
        jobs = json.loads(file.metadata()["jobs"])
    input_ids = load_file("in.safetensors")["input_ids"]
    outputs, facts = {}, {}
    for name, job in jobs.items():
        output, facts[name] = run(job, input_ids)
        outputs |= {f"{name}/{key}": value.contiguous() for key, value in output.items()}
    save_file(outputs, "out.safetensors")
    Path("facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
