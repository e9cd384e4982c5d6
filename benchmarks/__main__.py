"""List all benchmarks, and run one of them.

    python -m benchmarks                 the list
    python -m benchmarks NAME [FLAGS]    one of them; its flags with --help

A benchmark is a file of this folder whose docstring says how it is run.
"""

import ast
import runpy
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from foreign.terminal import guard_output, one_line

FOLDER = Path(__file__).resolve().parent
WITHOUT_A_GPU = ("fits", "fp8_curves", "fp8_error", "report")
WORKS_ANYWHERE = f"{', '.join(WITHOUT_A_GPU[:-1])} and {WITHOUT_A_GPU[-1]}"


def has_gpu() -> bool:
    """Ask torch, which takes seconds to import, where the answer matters."""
    import torch

    return torch.cuda.is_available()


def benchmarks() -> dict[str, str]:
    """Find the benchmarks: their names, and what each one does."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        if f"    python -m benchmarks {path.stem}" in docstring:
            found[path.stem] = docstring.partition("\n")[0]
    return found


def listed() -> str:
    """Write the list, and what of it this machine can run."""
    found = benchmarks()
    width = max(map(len, found))
    lines = [f"  {name:<{width}}  {what}" for name, what in found.items()]
    if not has_gpu():
        lines.append(f"\nThis machine has no CUDA GPU: {WORKS_ANYWHERE} work here.")
    return "\n".join(["python -m benchmarks NAME [FLAGS]; NAME is one of\n", *lines])


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark that the first argument names.

    Raises:
        ValueError: there is none of that name, or it needs a GPU and there is none.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(listed())
        return
    name, *flags = arguments
    found = benchmarks()
    if name not in found:
        near = get_close_matches(name, found, n=1)
        advice = f"did you mean {near[0]}?" if near else "python -m benchmarks lists them"
        raise ValueError(f"NAME must be one of the {len(found)} benchmarks: got {name!r}; {advice}")
    asks_for_help = "-h" in flags or "--help" in flags
    if not (name in WITHOUT_A_GPU or asks_for_help or has_gpu()):
        raise ValueError(
            f"{name} needs a CUDA GPU: torch.cuda.is_available() is False; "
            f"{WORKS_ANYWHERE} work without one"
        )
    sys.argv = [f"python -m benchmarks {name}", *flags]
    runpy.run_module(f"benchmarks.{name}", run_name="__main__")


if __name__ == "__main__":
    guard_output()
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        # what the user gave, or what the disk refused: the message is enough
        sys.exit(f"error: {one_line(error)}")
