"""A peer's training step in a process of its own; `benchmarks/train_step.py` starts a copy of this
file, and of step_timing.py beside it, outside of the checkout.

    hf        transformers, PEFT and bitsandbytes as their documentation puts them together:
              prepare_model_for_kbit_training, gradient checkpointing, torch's attention
    unsloth   FastLanguageModel; its policy `offload` is use_gradient_checkpointing="unsloth",
              `recompute` is True, `keep` is False

Transformers and bitsandbytes ask for a package named `kernels`, and would find this repository's.
"""

import argparse
import sys
import time
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIMIZERS = {"paged_adamw_32bit": "PagedAdamW32bit", "paged_adamw_8bit": "PagedAdamW8bit"}
CHECKPOINTING = {"keep": False, "recompute": True, "offload": "unsloth"}
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "unsloth")
# positions of Llama-3-8B
MAX_LENGTH = 8192
MAX_NORM = 1.0


def versions():
    """Say which versions of the peers are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def load_hf(arguments, modules, torch, device):
    """Load with transformers, attach with PEFT; returns the model and the seconds of the former."""
    transformers, peft = import_module("transformers"), import_module("peft")
    start = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.model,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=True,
        ),
        device_map={"": 0} if device == "cuda" else "cpu",
        dtype=torch.bfloat16,
        attn_implementation="sdpa",
    )
    load_s = time.perf_counter() - start
    model.config.use_cache = False
    model = peft.prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=arguments.policy != "keep",
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    lora = peft.LoraConfig(
        r=arguments.rank,
        lora_alpha=arguments.alpha,
        target_modules=modules,
        lora_dropout=arguments.dropout,
        bias="none",
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, lora).train(), load_s


def load_unsloth(arguments, modules, torch):
    """Load and attach with Unsloth; returns the model and the seconds of the former."""
    fast = import_module("unsloth").FastLanguageModel
    start = time.perf_counter()
    model, _ = fast.from_pretrained(
        arguments.model, max_seq_length=MAX_LENGTH, dtype=torch.bfloat16, load_in_4bit=True
    )
    load_s = time.perf_counter() - start
    model = fast.get_peft_model(
        model,
        r=arguments.rank,
        target_modules=modules,
        lora_alpha=arguments.alpha,
        lora_dropout=arguments.dropout,
        bias="none",
        use_gradient_checkpointing=CHECKPOINTING[arguments.policy],
    )
    fast.for_training(model)
    return model, load_s


def make_optimizer(name, parameters, torch):
    """Make bitsandbytes' optimizer of a name of transformers, or torch's."""
    rate = 2e-4
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    return getattr(import_module("bitsandbytes").optim, OPTIMIZERS[name])(parameters, lr=rate)


def parser():
    result = argparse.ArgumentParser(description="Measure a peer's training step.")
    result.add_argument("--provider", choices=["hf", "unsloth"], required=True)
    result.add_argument("--policy", choices=list(CHECKPOINTING), required=True)
    result.add_argument("--model", required=True)
    result.add_argument("--shapes", required=True)
    result.add_argument("--steps", type=int, required=True)
    result.add_argument("--started", type=float, required=True)
    result.add_argument("--target-modules", required=True)
    result.add_argument("--rank", type=int, required=True)
    result.add_argument("--alpha", type=float, required=True)
    result.add_argument("--dropout", type=float, required=True)
    result.add_argument("--optim", choices=[*OPTIMIZERS, "adamw"], required=True)
    return result


def main():
    arguments = parser().parse_args()
    if arguments.provider == "unsloth":
        # it patches the others, so it asks to be first
        import_module("unsloth")
    torch, timing = import_module("torch"), import_module("step_timing")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    named = arguments.target_modules
    modules = LINEAR if named == "all-linear" else named.split(",")
    if arguments.provider == "unsloth":
        model, load_s = load_unsloth(arguments, modules, torch)
    else:
        model, load_s = load_hf(arguments, modules, torch, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(arguments.optim, parameters, torch)

    def step(ids):
        ids = ids.to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            mask = torch.ones_like(ids)
            loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    facts = {"provider": arguments.provider, "policy": arguments.policy}
    facts |= {"load_s": round(load_s, 2), "optimizer": type(optimizer).__name__}
    timing.print_row({"versions": versions()})
    timing.measure_shapes(
        facts,
        arguments.shapes.split(","),
        model.config.vocab_size,
        arguments.steps,
        arguments.started,
        lambda shape: (step, {}),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
