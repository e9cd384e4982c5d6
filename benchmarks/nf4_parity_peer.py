"""bitsandbytes' half of `benchmarks.nf4_parity`, run outside of the checkout.

For every NAME.in of a folder, writes NAME.out: what bitsandbytes stores on the GPU, and expands.
"""

import sys
from pathlib import Path

# a script's own folder comes first on the path; nothing of the checkout may be found
del sys.path[0]

import bitsandbytes.functional as bnb  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


def main() -> None:
    for path in sorted(Path(sys.argv[1]).glob("*.in")):
        with safe_open(path, framework="pt", device="cuda") as file:
            weight, block_size = file.get_tensor("weight"), int(file.metadata()["block_size"])
        packed, state = bnb.quantize_4bit(
            weight, blocksize=block_size, compress_statistics=True, quant_type="nf4"
        )
        assert state.state2 is not None
        assert state.offset is not None
        parts = {
            "packed": packed.flatten(),
            "absmax_codes": state.absmax,
            "group_absmax": state.state2.absmax,
            "absmax_mean": state.offset.view(1),
            "expanded": bnb.dequantize_4bit(packed, state).flatten(),
        }
        save_file({name: part.cpu() for name, part in parts.items()}, path.with_suffix(".out"))


if __name__ == "__main__":
    main()
