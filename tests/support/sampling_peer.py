"""transformers' processors of logits; run by `peer_process.run_peer`.

In: "logits" (B, V) float64, "seen" (B, T) the ids of each sequence, and as metadata the settings.
Out: for each setting the probabilities (B, V), in its order.
"""

import json
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LogitsProcessorList
from transformers.generation import logits_process


def main() -> None:
    with safe_open("in.safetensors", framework="pt") as file:
        cases = json.loads(file.metadata()["cases"])
    given = load_file("in.safetensors")
    # pyright has these classes take tensors of types that torch does not make
    seen: Any = given["seen"]
    outputs = {}
    for name, case in cases.items():
        processors = LogitsProcessorList(
            [
                logits_process.RepetitionPenaltyLogitsProcessor(case["repetition_penalty"]),
                logits_process.TemperatureLogitsWarper(case["temperature"]),
            ]
        )
        if case["top_k"] is not None:
            processors.append(logits_process.TopKLogitsWarper(case["top_k"]))
        if case["top_p"] < 1:
            processors.append(logits_process.TopPLogitsWarper(case["top_p"]))
        scores: Any = processors(seen, given["logits"].clone())
        outputs[name] = scores.softmax(dim=1)
    save_file(outputs, "out.safetensors")


if __name__ == "__main__":
    main()
