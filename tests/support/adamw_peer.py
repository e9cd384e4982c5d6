"""Takes steps of bitsandbytes' AdamW; run by `peer_process.run_peer`.

In: "parameter/NAME" and "gradient/STEP/NAME", and as metadata the device, the learning rate, the
weight decay and the number of steps. Out, for AdamW ("32") and AdamW8bit ("8"): "BITS/STEP/NAME",
the parameters after each step, and after the first the state, "BITS/state/NAME/PART".
"""

import torch
from bitsandbytes.optim.adamw import AdamW, AdamW8bit
from safetensors import safe_open
from safetensors.torch import load_file, save_file

OPTIMIZERS = {"32": AdamW, "8": AdamW8bit}
PARTS = ("state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2")


def main():
    with safe_open("in.safetensors", "pt") as file:
        facts = file.metadata()
    tensors = load_file("in.safetensors", facts["device"])
    names = [key.split("/", 1)[1] for key in tensors if key.startswith("parameter/")]
    results = {}
    for bits, optimizer_class in OPTIMIZERS.items():
        parameters = {
            name: torch.nn.Parameter(tensors[f"parameter/{name}"].clone()) for name in names
        }
        optimizer = optimizer_class(
            list(parameters.values()),
            lr=float(facts["learning_rate"]),
            weight_decay=float(facts["weight_decay"]),
        )
        for step in range(int(facts["num_steps"])):
            for name, parameter in parameters.items():
                parameter.grad = tensors[f"gradient/{step}/{name}"].clone()
            optimizer.step()
            for name, parameter in parameters.items():
                results[f"{bits}/{step}/{name}"] = parameter.detach().cpu().clone()
            if step == 0:
                for name, parameter in parameters.items():
                    for part in PARTS:
                        if part in optimizer.state[parameter]:
                            value = optimizer.state[parameter][part].cpu().clone()
                            results[f"{bits}/state/{name}/{part}"] = value
    save_file(results, "out.safetensors")


if __name__ == "__main__":
    main()
