"""Which of a model's projections get a low-rank update, and how large it is."""

from collections.abc import Iterable, Sequence

from foreign.guest import in_guest
from lora.config import ALL_LINEAR, LoRAConfig, UpdateSize

# of an MLP, which may have updates in all models but mixtures of experts: there PEFT takes them for
# those of the experts
_OF_MLP = ("gate_proj", "up_proj", "down_proj")


def update_sizes(
    lora: LoRAConfig,
    paths: Iterable[str],  # of projections
    parameters: Iterable[str] = (),  # paths of tensors of all experts that may have updates
) -> dict[str, UpdateSize]:
    """Find which projections and tensors of experts get an update, and its size.

    Raises:
        ValueError: none does, or the head, the embeddings or single experts would.
    """
    paths, parameters = list(paths), list(parameters)
    # patterns come with an adapter, and matching one may take for ever
    if lora.has_patterns:
        sizes = in_guest(
            lambda: _find_sizes(lora, paths, parameters), "the adapter's patterns of modules"
        )
    else:
        sizes = _find_sizes(lora, paths, parameters)
    if not sizes:
        raise ValueError(
            f"target_modules must fit at least one projection of the model, such as {paths[0]}: "
            f"got {lora.target_modules!r}"
        )
    return sizes


def _find_sizes(
    lora: LoRAConfig, paths: Sequence[str], parameters: Sequence[str]
) -> dict[str, UpdateSize]:
    for path in ("lm_head", "model.embed_tokens", "model.language_model.embed_tokens"):
        if lora.has_target(path):
            raise ValueError(
                "target_modules must be projections of the layers, head and embeddings stay as "
                f"they are: {lora.target_modules!r} includes {path}"
            )
    is_mixture = not any(path.endswith(f".{_OF_MLP[-1]}") for path in paths)
    for name in _OF_MLP if is_mixture and lora.target_modules != ALL_LINEAR else ():
        if lora.has_target(f"model.layers.0.mlp.experts.0.{name}"):
            raise ValueError(
                "target_modules must be projections of attention in a mixture of experts: "
                f"{lora.target_modules!r} includes {name}; all experts together are "
                "target_parameters (--target-parameters gate_up_proj,down_proj)"
            )
    unknown = [name for name in lora.target_parameters if not _ends_any(name, parameters)]
    if unknown:
        if not parameters:
            raise ValueError(
                "--target-parameters must be left out, it is for mixtures of experts: got "
                f"target_parameters {unknown[0]!r}"
            )
        names = sorted({path.rpartition(".")[2] for path in parameters})
        raise ValueError(
            "target_parameters must be tensors of all experts, of which this model has "
            f"{', '.join(names)}: got {unknown[0]!r}"
        )
    sizes = {path: lora.update_size(path) for path in paths}
    sizes |= {path: lora.parameter_size(path) for path in parameters}
    return {path: size for path, size in sizes.items() if size is not None}


def _ends_any(name: str, paths: Sequence[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for path in paths)
