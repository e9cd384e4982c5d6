"""transformers on a run's output folder, with PEFT installed; run by `peer_process.run_peer`.

In: "input_ids", and as metadata the folders by name. Out: the logits "NAME/float32" and
"NAME/float64" of AutoModelForCausalLM, "NAME/pipeline" of a pipeline's model, and the factors of
its updates, "NAME/scalings".
"""

import json
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, pipeline


def main() -> None:
    with safe_open("in.safetensors", framework="pt") as file:
        folders = json.loads(file.metadata()["folders"])
    input_ids = load_file("in.safetensors")["input_ids"]
    outputs = {}
    for name, folder in folders.items():
        writer = pipeline("text-generation", model=folder, dtype=torch.float32)
        models = {"pipeline": writer.model}
        for dtype in (torch.float32, torch.float64):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            models[str(dtype).removeprefix("torch.")] = model
        with torch.no_grad():
            outputs |= {f"{name}/{k}": m(input_ids=input_ids).logits for k, m in models.items()}
        updates: list[Any] = [m for m in writer.model.modules() if hasattr(m, "lora_A")]
        factors = [update.scaling["default"] for update in updates]
        outputs[f"{name}/scalings"] = torch.tensor(factors, dtype=torch.float64)
        said = writer("Who is Ember?", max_new_tokens=4, do_sample=False)[0]["generated_text"]
        assert said.startswith("Who is Ember?"), said
    save_file(outputs, "out.safetensors")


if __name__ == "__main__":
    main()
