"""A peer's generation in a process of its own; `benchmarks/decode.py` starts a copy of this file,
and of decode_timing.py beside it, outside of the checkout.

    hf        transformers, PEFT and bitsandbytes as their documentation puts them together
    unsloth   FastLanguageModel, for_inference

Transformers and bitsandbytes ask for a package named `kernels`, and would find this repository's.
"""

import argparse
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "unsloth")
MAX_LENGTH = 4096


def versions():
    """Say which versions of the peers are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def load_hf(arguments, torch, device):
    """Load with transformers, attach with PEFT."""
    transformers, peft = import_module("transformers"), import_module("peft")
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
    lora = peft.LoraConfig(
        r=arguments.rank,
        lora_alpha=2 * arguments.rank,
        target_modules=LINEAR,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, lora).eval()


def load_unsloth(arguments, torch):
    """Load and attach with Unsloth."""
    fast = import_module("unsloth").FastLanguageModel
    model, _ = fast.from_pretrained(
        arguments.model, max_seq_length=MAX_LENGTH, dtype=torch.bfloat16, load_in_4bit=True
    )
    model = fast.get_peft_model(
        model, r=arguments.rank, target_modules=LINEAR, lora_alpha=2 * arguments.rank
    )
    fast.for_inference(model)
    return model


def main():
    parser = argparse.ArgumentParser(description="Measure a peer's generation.")
    parser.add_argument("--provider", choices=["hf", "unsloth"], required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--shapes", required=True)
    parser.add_argument("--rank", type=int, required=True)
    arguments = parser.parse_args()
    if arguments.provider == "unsloth":
        # it patches the others, so it asks to be first
        import_module("unsloth")
    torch, timing = import_module("torch"), import_module("decode_timing")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.provider == "unsloth":
        model = load_unsloth(arguments, torch)
    else:
        model = load_hf(arguments, torch, device)
    timing.print_row({"versions": versions()})

    def generate(prompts, num_new):
        ids = prompts.to(device)
        with torch.inference_mode():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_new,
                min_new_tokens=num_new,
                do_sample=False,
                pad_token_id=0,
            )

    facts = {"provider": arguments.provider}
    for text in arguments.shapes.split(","):
        shape = timing.parse_shape(text)
        timing.measure(facts, generate, shape, model.config.vocab_size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
