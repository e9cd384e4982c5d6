"""transformers and PEFT on a checkpoint; run by `peer_process.run_peer`.

In: "input_ids" and more, and as metadata the job: what to compute of which checkpoint, and the
folders to read and write. Out: "logits" and more, and facts.json in the working directory with what
is no tensor.
"""

import contextlib
import io
import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors


def load(job: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    # before 5.24 the default drops Gemma-2's cap on scores, without a word
    implementation = {"attn_implementation": "eager"} if job.get("is_capped") else {}
    if job.get("has_experts"):
        # torch's grouped products do not take float64
        implementation["experts_implementation"] = "eager"
    model = AutoModelForCausalLM.from_pretrained(job["checkpoint"], dtype=dtype, **implementation)
    return model.eval()


def summed_loss(model: Any, input_ids: Tensor, labels: Tensor) -> Tensor:
    logits = model(input_ids=input_ids).logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def mean_loss(model: Any, chunks: Tensor) -> float:
    total = sum(float(summed_loss(model, part, part)) for part in chunks.split(20))
    return total / (chunks.shape[0] * (chunks.shape[1] - 1))


def make_adapter(job: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make an adapter as PEFT does, save it, and compute its logits and gradients."""
    model = get_peft_model(load(job), LoraConfig(task_type=TaskType.CAUSAL_LM, **job["lora"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(job["peft_adapter"])
    summed_loss(model, inputs["input_ids"], inputs["labels"]).backward()
    output = {"peft_adapter_logits": model(input_ids=inputs["input_ids"]).logits.detach()}
    trained = {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    output |= {f"grad.{name}": parameter.grad for name, parameter in trained.items()}
    if job.get("has_experts"):
        given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        loss = model(**given, output_router_logits=True).aux_loss
        # the last experts do not choose again
        grads = torch.autograd.grad(loss, list(trained.values()), materialize_grads=True)
        output["aux_loss"] = loss.detach()
        output |= {f"aux_grad.{n}": grad for n, grad in zip(trained, grads, strict=True)}
    return output


def trainable_line(job: dict[str, Any], targets: Any) -> str:
    model = get_peft_model(load(job), LoraConfig(r=job["rank"], target_modules=targets))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        model.print_trainable_parameters()
    return printed.getvalue().strip()


def load_adapter(job: dict[str, Any], adapter: str) -> tuple[Any, list[str]]:
    """Load an adapter with PEFT, recording every warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(load(job), adapter)
    return model, [str(each.message) for each in caught]


def greedy(model: Any, input_ids: Tensor) -> Tensor:
    """Continue the first tokens by the most probable ones, whatever ends an answer."""
    # a prompt longer than a window; no token of it is padding
    prompt = input_ids[:1, :12]
    return model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=None,
    )


def run(job: dict[str, Any], inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    input_ids = inputs["input_ids"]
    model = load(job)
    # one set of frequencies, or one for each kind of layer
    named = model.model.rotary_emb.named_buffers()
    output = {name: t for name, t in named if "inv_freq" in name and "original" not in name}
    facts: dict[str, Any] = {}
    with torch.no_grad():
        output["logits"] = model(input_ids=input_ids).logits
        output["greedy"] = greedy(model, input_ids)
        for dtype in job.get("dtypes", []):
            output[f"logits.{dtype}"] = load(job, getattr(torch, dtype))(input_ids=input_ids).logits
        if "chunks" in inputs:
            facts["mean_loss"] = mean_loss(model, inputs["chunks"])
    if "blocks" in inputs:
        output["expanded"] = convert_moe_packed_tensors(inputs["blocks"], inputs["scales"])
    if "resaved" in job:
        model.save_pretrained(job["resaved"], max_shard_size="20KB")
    if "lora" in job:
        output |= make_adapter(job, inputs)
        _, facts["peft_adapter_warnings"] = load_adapter(job, job["peft_adapter"])
        adapted, facts["our_adapter_warnings"] = load_adapter(job, job["our_adapter"])
        output["our_adapter_logits"] = adapted(input_ids=input_ids).logits.detach()
        output["our_adapter_greedy"] = greedy(adapted, input_ids)
    if "merged" in job:
        merged = load(job | {"checkpoint": job["merged"]})
        output["merged_logits"] = merged(input_ids=input_ids).logits.detach()
    for name, targets in job.get("trainable", {}).items():
        facts[f"trainable.{name}"] = trainable_line(job, targets)
    return output, facts


def main() -> None:
    torch.manual_seed(0)
    with safe_open("in.safetensors", framework="pt") as file:
        job = json.loads(file.metadata()["job"])
    outputs, facts = run(job, load_file("in.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in outputs.items()}, "out.safetensors")
    Path("facts.json").write_text(json.dumps(facts))


if __name__ == "__host__":
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    # takes longer than loading a tiny checkpoint does
    get_checkpoint_conversion_mapping("llama")

if __name__ == "__main__":
    main()
