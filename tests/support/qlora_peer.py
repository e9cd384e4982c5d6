"""QLoRA as transformers, PEFT, bitsandbytes and torch do it; run by `peer_process.run_peer`.

In: "step/S/micro/I/input_ids" and "labels" (-100 is no loss, and padding has it too), as metadata
the folders of the checkpoint, of the initial and of our trained adapter, and the optimizer's
settings; "final/input_ids", and "codes/MODULE", the double-quantized scales by the CUDA rule. Out:
losses and gradient norms of every step, the number of codes in which the CPU backend differs, and
the logits of our adapter, loaded by PEFT over a base with the given codes.
"""

import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def load_base(checkpoint):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=quantization, dtype=torch.float32, device_map="cpu"
    )


def summed_loss(model, input_ids, labels):
    logits = model(input_ids=input_ids).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def train(model, tensors, num_steps, num_micro, facts):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=float(facts["learning_rate"]), weight_decay=float(facts["weight_decay"])
    )
    losses, norms = [], []
    # bitsandbytes' CPU backend repacks a weight, with rounded scales, at its first forward in
    # eval mode
    model.train()
    for step in range(num_steps):
        batches = [
            (tensors[f"step/{step}/micro/{i}/input_ids"], tensors[f"step/{step}/micro/{i}/labels"])
            for i in range(num_micro)
        ]
        num_targets = sum(int((labels[:, 1:] != -100).sum()) for _, labels in batches)
        optimizer.zero_grad()
        loss = 0.0
        for input_ids, labels in batches:
            part = summed_loss(model, input_ids, labels) / num_targets
            part.backward()
            loss += float(part)
        losses.append(loss)
        norms.append(
            float(torch.nn.utils.clip_grad_norm_(parameters, float(facts["max_grad_norm"])))
        )
        optimizer.step()
    return {"losses": torch.tensor(losses).double(), "grad_norms": torch.tensor(norms).double()}


def replace_codes(base, tensors):
    """Give the frozen weights the scales of the CUDA rule; count the CPU backend's differences."""
    num_different = 0
    for name, module in base.named_modules():
        if f"codes/{name}" in tensors:
            codes = module.weight.quant_state.absmax
            num_different += int((codes != tensors[f"codes/{name}"]).sum())
            codes.copy_(tensors[f"codes/{name}"])
    return torch.tensor(num_different)


def main():
    torch.manual_seed(0)
    with safe_open("in.safetensors", framework="pt") as file:
        facts = file.metadata()
    tensors = load_file("in.safetensors")
    base = load_base(facts["checkpoint"])
    model = PeftModel.from_pretrained(base, facts["adapter"], is_trainable=True)
    results = train(model, tensors, int(facts["num_steps"]), int(facts["num_micro"]), facts)
    base = load_base(facts["checkpoint"])
    results["num_different_codes"] = replace_codes(base, tensors)
    ours = PeftModel.from_pretrained(base, facts["our_adapter"]).train()
    with torch.no_grad():
        results["loaded_logits"] = ours(input_ids=tensors["final/input_ids"]).logits
    save_file({name: tensor.contiguous() for name, tensor in results.items()}, "out.safetensors")


if __name__ == "__main__":
    main()
