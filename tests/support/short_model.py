"""The bundled model without its upper half, for tests of how a run goes on, stops and is written.

What such a test claims does not depend on the number of layers, as long as a first one, which needs
no gradient of its input, and a last one differ; a step of two takes half the time of four.
"""

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

from safetensors.torch import load_file, save_file

from prepare.job import BUNDLED

NUM_LAYERS = 2


@cache
def short_model() -> Path:
    """The folder of such a checkpoint, gone when the tests of this process are."""
    folder = Path(tempfile.mkdtemp(prefix="short-model-")).resolve()
    atexit.register(shutil.rmtree, folder)
    shutil.copytree(BUNDLED / "model", folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    upper = tuple(f"model.layers.{i}." for i in range(NUM_LAYERS, config["num_hidden_layers"]))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": NUM_LAYERS}))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(upper)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder
