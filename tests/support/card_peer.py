"""The Python of a model card, line by line as it stands; run by `peer_process.run_peer`.

In: nothing; the card is README.md in the folder that its own lines name. Out: said.json in the
working directory: what each piece prints.
"""

import contextlib
import io
import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file


def main() -> None:
    card = Path("path/to/this/folder/README.md").read_text(encoding="utf-8")
    said = []
    for piece in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(piece, "README.md", "exec"), {})
        said.append(printed.getvalue())
    Path("said.json").write_text(json.dumps(said))
    save_file({"done": torch.ones(1)}, "out.safetensors")


if __name__ == "__main__":
    main()
