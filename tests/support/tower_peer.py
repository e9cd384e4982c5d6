"""transformers, PEFT and bitsandbytes on checkpoints with a tower; run by `peer_process.run_peer`.

In: "input_ids" and "labels", and as metadata a step and the jobs: the config.json of a checkpoint,
and the folders to write and read. The first step, "make", makes each checkpoint and PEFT's adapter
for it; the second, "read", reads what the product has written since. Out: "JOB/logits" and more,
and facts.json.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.nn.modules import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText


def make(job: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Write a checkpoint of random weights, by which every activation is of order one, and an
    adapter for it."""
    fields = job["fields"]
    config = AutoConfig.for_model(**fields)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.mul_(0.7)
    model.save_pretrained(job["checkpoint"])
    model = load(job["checkpoint"])
    input_ids = inputs["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=input_ids).logits
    tokens = greedy(model, input_ids)
    return {"logits": logits, "greedy": tokens, **make_adapter(job, inputs)}


def greedy(model: Any, input_ids: Tensor) -> Tensor:
    """Continue the first tokens by the most probable ones, whatever ends an answer."""
    # a prompt longer than a window; no token of it is padding
    prompt = input_ids[:1, :12]
    return model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
    )


def load(folder: str, **options: Any) -> Any:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **options)
    return model if options else model.eval()


def make_adapter(job: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make an adapter as PEFT does, save it, and compute its logits and gradients."""
    targets = r"model\.language_model\..*_proj"
    lora = LoraConfig(r=3, lora_alpha=10, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(load(job["checkpoint"]), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(job["peft_adapter"])
    logits = model(input_ids=inputs["input_ids"]).logits
    F.cross_entropy(
        logits[:, :-1].flatten(0, 1),
        inputs["labels"][:, 1:].flatten(),
        ignore_index=-100,
        reduction="sum",
    ).backward()
    gradients = {
        f"grad.{name.removeprefix('base_model.model.').replace('.default.', '.')}": parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {"peft_adapter_logits": logits.detach(), **gradients}


@torch.no_grad()
def read(job: dict[str, Any], input_ids: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what the product wrote."""
    facts: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = PeftModel.from_pretrained(load(job["checkpoint"]), job["our_adapter"])
    facts["warnings"] = [str(each.message) for each in caught]
    facts["adapted"] = [
        name.removeprefix("base_model.model.")
        for name, module in adapted.named_modules()
        if isinstance(module, LoraLayer)
    ]
    output = {"our_adapter_logits": adapted(input_ids=input_ids).logits}
    merged, info = load(job["merged"], output_loading_info=True)
    facts["merged"] = {key: len(found) for key, found in info.items()}
    output["merged_logits"] = merged.eval()(input_ids=input_ids).logits
    quantized, info = load(job["quantized"], output_loading_info=True)
    facts["quantized"] = {key: len(found) for key, found in info.items()}
    facts["in_4_bits"] = [
        name for name, module in quantized.named_modules() if isinstance(module, Linear4bit)
    ]
    # in eval mode the CPU backend repacks a weight at its first forward, with rounded scales
    output["quantized_logits"] = quantized.train()(input_ids=input_ids).logits
    return output, facts


def main() -> None:
    torch.manual_seed(0)
    with safe_open("in.safetensors", framework="pt") as file:
        metadata = file.metadata()
    jobs = json.loads(metadata["jobs"])
    inputs = load_file("in.safetensors")
    outputs, facts = {}, {}
    for name, job in jobs.items():
        if metadata["step"] == "make":
            output, facts[name] = make(job, inputs), {}
        else:
            output, facts[name] = read(job, inputs["input_ids"])
        outputs |= {f"{name}/{key}": value.contiguous() for key, value in output.items()}
    save_file(outputs, "out.safetensors")
    Path("facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
