"""How the next token is chosen: by the flags, else by the checkpoint's generation_config.json."""

import argparse
from pathlib import Path
from typing import Any

from foreign.json_fields import JsonFields
from foreign.json_text import read_object
from foreign.reading import Reading
from generation.sampling import Sampling
from llama.config import GENERATION_CONFIG_NAME


def choose_sampling(given: argparse.Namespace, folder: Path) -> tuple[Sampling, str]:
    """Take each setting from its flag, else from a checkpoint's folder, else its default.

    generation_config.json counts as in transformers: temperature, top-k and top-p where it has
    do_sample, the repetition penalty always.

    Returns:
        The sampling, and a line that says where each setting comes from.

    Raises:
        ValueError: generation_config.json is malformed, or flags ask for draws of greedy text.
    """
    settings: dict[str, Any] = Sampling()._asdict() | {"seed": given.seed}
    sources: dict[str, str] = {}
    for name, value in _stored(folder / GENERATION_CONFIG_NAME).items():
        settings[name], sources[name] = value, GENERATION_CONFIG_NAME
    for name in ("temperature", "top_k", "top_p", "repetition_penalty"):
        if (value := getattr(given, name)) is not None:
            settings[name], sources[name] = value, f"--{name.replace('_', '-')}"
    # 0 is the usual way to say: from all
    settings["top_k"] = settings["top_k"] or None
    sampling = Sampling(**settings)
    drawn_by = [s for s in (sources.get("top_k"), sources.get("top_p")) if s and s[0] == "-"]
    if sampling.temperature == 0 and drawn_by:
        raise ValueError(
            f"{drawn_by[0]} must be given with a --temperature above 0: without one the most "
            "probable token is taken"
        )
    return sampling, _describe(sampling, sources)


def _stored(path: Path) -> dict[str, Any]:
    """The settings of a generation_config.json, as far as they are there."""
    if not path.is_file():
        return {}
    with Reading(path):
        fields = JsonFields(path, read_object(path))
        found: dict[str, Any] = {"repetition_penalty": fields.optional_number("repetition_penalty")}
        if fields.boolean("do_sample", False):
            found["temperature"] = fields.number("temperature", 1.0)
            found["top_p"] = fields.optional_number("top_p")
            # transformers writes 0 where top-k is off
            found["top_k"] = fields.integer("top_k") if fields.values.get("top_k") else None
        if (top_p := found.get("top_p")) is not None and top_p > 1:
            raise ValueError(f"{path}: top_p must be at most 1: got {top_p}")
    return {name: value for name, value in found.items() if value is not None}


def _describe(sampling: Sampling, sources: dict[str, str]) -> str:
    is_drawn = sampling.temperature > 0
    parts = [("temperature", sampling.temperature)] if is_drawn else []
    if is_drawn and sampling.top_k:
        parts.append(("top_k", sampling.top_k))
    if is_drawn and sampling.top_p < 1:
        parts.append(("top_p", sampling.top_p))
    if sampling.repetition_penalty != 1:
        parts.append(("repetition_penalty", sampling.repetition_penalty))
    said = [f"{name.replace('_', ' ')} {value:g} ({sources[name]})" for name, value in parts]
    if not is_drawn:
        source = sources.get("temperature", "default")
        return ", ".join([f"the most probable token ({source})", *said])
    return ", ".join([*said, f"seed {sampling.seed}"])
