"""Compares export/'s GGUF files with those of llama.cpp's own converter, tensor by tensor and field
by field. Run by hand, with a copy of llama.cpp's sources:

    python tests/support/gguf_peer.py LLAMA_CPP FOLDER ... [--python PYTHON]

FOLDER is a checkpoint with its tokenizer; PYTHON has what the converter needs.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from gguf import GGUFReader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from checkpoint.opening import open_checkpoint
from data.tokenizer import Tokenizer
from export.gguf_file import plan_gguf, write_gguf
from merging.flags import TYPES

# descriptions that decide nothing
DESCRIPTIONS = "general."


def fields_of(reader: GGUFReader) -> dict[str, object]:
    return {name: f.contents() for name, f in reader.fields.items() if not name.startswith("GGUF.")}


def differences(ours: Path, theirs: Path) -> list[str]:
    found = []
    our_fields, their_fields = (fields_of(GGUFReader(path)) for path in (ours, theirs))
    for name in sorted(our_fields.keys() | their_fields.keys()):
        one, other = our_fields.get(name), their_fields.get(name)
        if one != other and not name.startswith(DESCRIPTIONS):
            if isinstance(one, list) and isinstance(other, list):
                pairs = zip(one, other, strict=False)
                places = [i for i, (a, b) in enumerate(pairs) if a != b]
                first = [(i, one[i], other[i]) for i in places[:3]]
                found.append(f"{name}: {len(one)}, {len(other)}; {len(places)} differ: {first}")
            else:
                found.append(f"{name}: {one!r}, {other!r}")
    our_tensors, their_tensors = (
        {t.name: t for t in GGUFReader(p).tensors} for p in (ours, theirs)
    )
    for name in sorted(our_tensors.keys() | their_tensors.keys()):
        if name not in our_tensors or name not in their_tensors:
            found.append(f"{name}: only {'ours' if name in our_tensors else 'theirs'}")
            continue
        one, other = our_tensors[name], their_tensors[name]
        if one.tensor_type != other.tensor_type or list(one.shape) != list(other.shape):
            found.append(f"{name}: {one.tensor_type}, {other.tensor_type}")
        elif not np.array_equal(one.data, other.data):
            largest = np.abs(one.data.astype(np.float64) - other.data.astype(np.float64)).max()
            found.append(f"{name}: {largest:.3g} apart at most")
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--python", default=sys.executable)
    given = parser.parse_args()
    for folder in given.folders:
        checkpoint = open_checkpoint(folder)
        for kind in TYPES:
            plan = plan_gguf(checkpoint, Tokenizer.from_folder(folder), folder, kind)
            with tempfile.TemporaryDirectory() as place:
                ours, theirs = Path(place, "ours.gguf"), Path(place, "theirs.gguf")
                write_gguf(plan, checkpoint, ours, folder.name, lambda done, total: None)
                script = given.llama_cpp / "convert_hf_to_gguf.py"
                command = [given.python, script, folder, "--outfile", theirs, "--outtype", kind]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    print(f"{folder.name} {kind}: the converter failed: {done.stderr[-500:]}")
                    continue
                found = differences(ours, theirs)
            print(f"{folder.name} {kind}: {len(plan.tensors)} tensors, {len(found)} differences")
            for line in found:
                print(f"    {line}")


if __name__ == "__main__":
    main()
